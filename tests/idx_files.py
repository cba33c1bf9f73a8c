"""Small IDX files, and the published .gz files of Fashion-MNIST, for tests of locating and downloading data."""

import gzip
import hashlib
import struct
from pathlib import Path

import torch

from distlenet.data import idx

# The time in the header of each published .gz file. Debian's package drops time and name from the header; with both
# restored, the bytes are those of torchvision's MD5 sums.
GZIP_TIMES = {
    "train-images-idx3-ubyte": 1504176606,
    "train-labels-idx1-ubyte": 1504176606,
    "t10k-images-idx3-ubyte": 1504176627,
    "t10k-labels-idx1-ubyte": 1504176627,
}


def original_gz(name: str, repacked: bytes) -> bytes:
    """Return the published .gz file, given one with the same compressed data and another header."""
    assert repacked[:2] == b"\x1f\x8b"
    body = repacked[10:]
    if repacked[3] & 8:  # the header contains a name
        body = body[body.index(b"\0") + 1 :]
    return b"\x1f\x8b\x08\x08" + struct.pack("<I", GZIP_TIMES[name]) + b"\0\x03" + name.encode() + b"\0" + body


def idx_bytes(values: torch.Tensor) -> bytes:
    """Return a uint8 tensor as an IDX file."""
    return (
        bytes((0, 0, 8, values.ndim))
        + struct.pack(f">{values.ndim}I", *values.shape)
        + bytes(values.flatten().tolist())
    )


def small_set(train: int = 30, test: int = 10) -> dict[str, bytes]:
    """Return the four files of a small set, uncompressed."""
    generator = torch.Generator().manual_seed(0)
    content = {}
    for prefix, size in (("train", train), ("t10k", test)):
        pixels = torch.randint(0, 256, (size, 28, 28), generator=generator, dtype=torch.uint8)
        content[f"{prefix}-images-idx3-ubyte"] = idx_bytes(pixels)
        content[f"{prefix}-labels-idx1-ubyte"] = idx_bytes((torch.arange(size) % 10).to(torch.uint8))
    return content


def write_set(directory: Path, content: dict[str, bytes], packed: bool) -> None:
    """Write the files of a set, plain or ``packed`` as .gz."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        if packed:
            (directory / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (directory / name).write_bytes(data)


def digests(content: dict[str, bytes]) -> dict[str, str]:
    """Return the entry of ``idx.SHA256`` for a set."""
    assert content.keys() == set(idx.FILES)
    return {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
