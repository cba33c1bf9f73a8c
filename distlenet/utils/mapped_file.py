"""Files that all processes of a node map: one copy in memory, however many ranks there are.

A plain file is mapped as it is. What has to be made first, such as a .gz file's contents, goes into a file that
lives in memory only (memfd_create), which other processes open through /proc. It takes no room on any disk nor in
/dev/shm, and is gone with the last process that maps it, however that ends.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Buffer

CHUNK = 2**20  # bytes read or written at a time


@dataclass(frozen=True)
class Place:
    """Where a process of this node finds a file, and which one it must be: its device and inode numbers."""

    path: str
    device: int
    inode: int

    def map(self, shared: bool = False) -> Tensor:
        """Return the file's bytes, uint8 (n,), in memory that all who map it share; writing is private, or ``shared``.

        Raises OSError where it is not there, or another file is: in a container that sees other processes; also where
        there is no memory for it.
        """
        found = os.stat(self.path)
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise FileNotFoundError(f"{self.path} is another file here")
        try:
            return torch.from_file(self.path, shared=shared, size=found.st_size, dtype=torch.uint8)
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error


class SharedFile:
    """An open file; others can map it as long as it is not closed."""

    def __init__(self, descriptor: int) -> None:
        """Own the open file ``descriptor``."""
        self.descriptor = descriptor
        status = os.fstat(descriptor)
        self.place = Place(f"/proc/{os.getpid()}/fd/{descriptor}", status.st_dev, status.st_ino)

    def sha256(self) -> str:
        """Hash the contents."""
        with open(self.place.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Let go; what is mapped stays."""
        os.close(self.descriptor)


def on_disk(path: Path) -> SharedFile:
    """Open a plain file. Raises OSError where that cannot be."""
    return SharedFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def in_memory(chunks: Iterable[Buffer]) -> SharedFile:
    """Make a file in memory of ``chunks``."""
    descriptor = os.memfd_create("distlenet")
    with open(descriptor, "wb", closefd=False) as file:
        for chunk in chunks:
            file.write(chunk)
    return SharedFile(descriptor)
