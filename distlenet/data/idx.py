"""IDX files, the format of MNIST and Fashion-MNIST: finding, verifying and reading them.

Format: http://yann.lecun.com/exdb/mnist/ (two zero bytes, type, number of dimensions, sizes, data).
"""

import gzip
import math
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from distlenet.utils.errors import UserError
from distlenet.utils.mapped_file import CHUNK, SharedFile, in_memory, on_disk

LARGEST = 16 + 60_000 * 28 * 28  # bytes, of the training images of both sets

UINT8 = 8  # the format's code for unsigned bytes

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# SHA-256 of the uncompressed files, so that a copy counts whoever compressed it: Debian's package and
# torchvision's download hold the same images in different .gz files. tests/unit/test_idx.py ties
# these numbers to the MD5 sums in torchvision.datasets.
SHA256 = {
    "fashion_mnist": dict(
        zip(
            FILES,
            (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            ),
            strict=True,
        )
    ),
    "mnist": dict(
        zip(
            FILES,
            (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            ),
            strict=True,
        )
    ),
}


def find(folder: Path) -> dict[str, Path] | None:
    """Return the paths of the four files, plain or .gz, in ``folder``; None where none of them is there.

    Raises UserError where some are there and others are not: half a data set is a mistake, not a choice.
    """
    found: dict[str, Path] = {}
    for name in FILES:
        for path in (folder / name, folder / f"{name}.gz"):
            try:
                regular = stat.S_ISREG(path.stat().st_mode)  # a pipe would be waited for, for ever
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise UserError(f"data {path}: cannot be read: {error.strerror}; give another data.root") from error
            if not regular:
                raise UserError(f"data {path}: is not a regular file; give another data.root")
            found.setdefault(name, path)
    if found and (missing := [name for name in FILES if name not in found]):
        raise UserError(f"data {folder}: lacks {', '.join(missing)} (plain or .gz); complete it or remove it")
    return found or None


def open_verified(path: Path, sha256: str) -> SharedFile:
    """Open one IDX file, unpacked into memory where it is a .gz, whose unpacked bytes must have the given SHA-256.

    Raises UserError that names the file where it cannot be read or is not the published one.
    """
    try:
        shared = unpacked(path) if path.suffix == ".gz" else on_disk(path)
        digest = shared.sha256()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data {path}: is damaged: {error}; remove it and run again") from error
    except OSError as error:
        raise UserError(f"data {path}: cannot be read: {error.strerror}; give another data.root") from error
    if digest != sha256:
        raise UserError(
            f"data {path}: is not the published file (SHA-256 {digest[:12]}..., expected {sha256[:12]}...); "
            "remove it and run again"
        )
    return shared


def unpacked(path: Path) -> SharedFile:
    """Unpack a .gz file into memory. Raises BadGzipFile for one of more bytes than any published file has."""

    def chunks() -> Iterator[bytes]:
        with gzip.open(path) as packed:
            left = LARGEST
            while chunk := packed.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise gzip.BadGzipFile(f"more than {LARGEST:,} bytes in it")
                yield chunk

    return in_memory(chunks())


def header(shape: tuple[int, ...]) -> bytes:
    """Write the header of an IDX file of unsigned bytes."""
    return bytes((0, 0, UINT8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def parse(content: Tensor) -> Tensor:
    """View the bytes of an IDX file of unsigned bytes, uint8 (n,), in its shape, without a copy.

    Raises ValueError where header and length do not agree.
    """
    if len(content) < 4 or content[:3].tolist() != [0, 0, UINT8]:
        raise ValueError("not an IDX file of unsigned bytes")
    dimensions = int(content[3])
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError("the IDX header is cut short")
    shape = struct.unpack(f">{dimensions}I", bytes(content[4:start].tolist()))
    if len(content) != start + math.prod(shape):
        raise ValueError(f"IDX data of {len(content) - start} bytes do not fill the shape {shape}")
    try:
        return content[start:].view(shape)
    except RuntimeError as error:  # some sizes are 0, and the others too large together
        raise ValueError(f"no tensor can have the shape {shape}") from error
