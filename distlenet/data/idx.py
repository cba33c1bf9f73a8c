"""IDX files, the format of MNIST and Fashion-MNIST (http://yann.lecun.com/exdb/mnist/): find, verify and read them."""

import gzip
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from distlenet.utils.errors import UserError
from distlenet.utils.mapped_file import CHUNK, SharedFile, create_shared, open_shared

UINT8 = 8  # the type code of unsigned bytes
MAX_BYTES = 16 + 60_000 * 28 * 28  # size of the largest published file, the training images

SHA256 = {
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
"""Checksums of the uncompressed files: Debian and torchvision distribute the same data in different .gz files."""

FILES = tuple(SHA256["mnist"])


def find_files(directory: Path) -> dict[str, Path] | None:
    """Return the four files in ``directory``, plain or .gz, or None. Raise UserError if only some of them exist."""
    candidates = ((name, directory / f"{name}{suffix}") for suffix in (".gz", "") for name in FILES)
    paths = {name: path for name, path in candidates if os.path.lexists(path)}  # a plain file takes precedence
    if paths and (missing := [name for name in FILES if name not in paths]):
        raise UserError(f"data {directory}: lacks {', '.join(missing)} (plain or .gz); add the rest or remove all")
    return paths or None


def open_verified(path: Path, sha256: str) -> SharedFile:
    """Open one file, decompressed into memory if it is a .gz. Raise UserError unless its contents match ``sha256``."""
    try:
        if not path.is_file():  # opening a pipe would block
            raise OSError("not a regular file")
        file = create_shared(_decompress(path)) if path.suffix == ".gz" else open_shared(path)
        digest = file.sha256()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data {path}: cannot be read: {reason}; remove it, or give another data.root") from error
    if digest != sha256:
        raise UserError(
            f"data {path}: is not the published file (SHA-256 {digest[:12]}..., expected {sha256[:12]}...); "
            "remove it and run again"
        )
    return file


def _decompress(path: Path) -> Iterator[bytes]:
    """Yield the contents of a .gz file. Raise BadGzipFile if they exceed the size of every published file."""
    size = 0
    with gzip.open(path) as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            if size > MAX_BYTES:
                raise gzip.BadGzipFile(f"contains more than {MAX_BYTES:,} bytes")
            yield chunk


def header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file of unsigned bytes: two zeros, type, number of dimensions, sizes."""
    return bytes((0, 0, UINT8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def parse(content: Tensor) -> Tensor:
    """Return the data of an IDX file, given as uint8 (n,), in its shape and without a copy. Raise ValueError."""
    if len(content) < 4 or content[:3].tolist() != [0, 0, UINT8]:
        raise ValueError("not an IDX file of unsigned bytes")
    start = 4 + 4 * int(content[3])
    try:
        shape = struct.unpack(f">{content[3]}I", bytes(content[4:start].tolist()))
        return content[start:].view(shape)
    except (struct.error, RuntimeError) as error:
        raise ValueError(f"the sizes in the IDX header do not fit the length of the file: {error}") from error
