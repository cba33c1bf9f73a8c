"""Files that all processes of a node map into memory: one copy, for any number of ranks.

A plain file is mapped directly. Generated content, such as a decompressed .gz file, goes into an anonymous file
(memfd_create) that other processes open through /proc. It needs no space on a disk or in /dev/shm, and disappears with
the last process that maps it, even after a kill.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Buffer

MAP_NORESERVE = 0x4000  # of Linux; Python 3.11 has no name for it
CHUNK = 2**20  # bytes read or written at a time


@dataclass(frozen=True)
class FileRef:
    """A reference to a file, valid in every process of a node: its path, and its device and inode for verification."""

    path: str
    device: int
    inode: int

    def map(self, shared: bool = False) -> Tensor:
        """Return the bytes of the file, as uint8 (n,). Writes are private unless ``shared``.

        Raise OSError without memory, or if the path leads elsewhere, as in a container with its own process namespace.
        """
        status = os.stat(self.path)
        if (status.st_dev, status.st_ino) != (self.device, self.inode):
            raise FileNotFoundError(f"{self.path} is another file in this process")
        if shared:
            try:
                return torch.from_file(self.path, shared=True, size=status.st_size, dtype=torch.uint8)
            except RuntimeError as error:
                raise OSError(" ".join(str(error).split())) from error
        # Not torch.from_file: the kernel refuses a private mapping that is larger than its memory, unless it need not
        # be reserved.
        with open(self.path, "rb") as file:
            content = mmap.mmap(file.fileno(), status.st_size, mmap.MAP_PRIVATE | MAP_NORESERVE)
        return torch.frombuffer(content, dtype=torch.uint8)


@dataclass(frozen=True)
class TensorRef:
    """A reference to a tensor in a file, in C order from byte ``offset``, a multiple of the size of its elements."""

    file: FileRef
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def map(self) -> Tensor:
        """Return the tensor without a copy. Raise OSError as ``FileRef.map``, ValueError if the file is too short."""
        size = math.prod(self.shape) * self.dtype.itemsize
        content = self.file.map()[self.offset : self.offset + size]
        if len(content) != size:
            raise ValueError(f"{self.file.path} has {len(content):,} of {size:,} bytes")
        return content.view(self.dtype).view(self.shape)


class SharedFile:
    """An open file that other processes can map until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.ref = FileRef(f"/proc/{os.getpid()}/fd/{descriptor}", status.st_dev, status.st_ino)

    def sha256(self) -> str:
        """Return the SHA-256 of the content, as hex digits."""
        with open(self.ref.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file. Existing mappings stay valid."""
        os.close(self.descriptor)


def open_shared(path: Path) -> SharedFile:
    """Open a plain file. Raise OSError."""
    return SharedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def create_shared(chunks: Iterable[Buffer]) -> SharedFile:
    """Create an anonymous file in memory from ``chunks``."""
    descriptor = os.memfd_create("distlenet")
    with open(descriptor, "wb", closefd=False) as file:
        for chunk in chunks:
            file.write(chunk)
    return SharedFile(descriptor)


def share_tensors(parts: Iterable[Tensor], samples: int) -> tuple[SharedFile, TensorRef]:
    """Create an anonymous file in memory from ``parts`` of a tensor with ``samples`` samples."""
    shape: tuple[int, ...] = ()
    dtype = torch.uint8

    def chunks() -> Iterator[Buffer]:
        nonlocal shape, dtype
        for part in parts:
            shape, dtype = tuple(part.shape[1:]), part.dtype
            yield part.contiguous().view(-1).view(torch.uint8).numpy().data

    file = create_shared(chunks())
    return file, TensorRef(file.ref, 0, (samples, *shape), dtype)
