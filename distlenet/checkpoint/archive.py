"""The bytes of a checkpoint file: the output of ``torch.save``, with a checksum inside.

``torch.save`` writes a ZIP archive, and an archive may end with a comment: it holds the SHA-256 of all bytes before it.
One rename therefore replaces both the data and the checksum, and ``torch.load`` reads the file as usual.
"""

import hashlib
import io
import os
from typing import Any, BinaryIO, Protocol

import torch

COMMENT_PREFIX = b"sha256:"
COMMENT_BYTES = len(COMMENT_PREFIX) + 2 * hashlib.sha256().digest_size
END_BYTES, END_SIGNATURE = 22, b"PK\5\6"  # of the end record, if the archive has no comment
READ_BYTES = 1 << 20  # at once, for the checksum


class Writable(Protocol):
    """A file open for writing."""

    def write(self, part: bytes | memoryview, /) -> Any:
        """Write all of ``part``."""


class _Stream:
    """A file for ``torch.save``: each part is written at once, so no copy of the state is needed.

    The last part is the end record of the archive, whose last two bytes are the length of the comment. A short part
    is therefore held back until the next one.
    """

    SHORT = 64  # bytes

    def __init__(self, file: Writable) -> None:
        self.file, self.checksum, self.held_back = file, hashlib.sha256(), b""
        self.failure: OSError | None = None

    def write(self, part: memoryview) -> int:
        """Write a part, and keep an error for ``finish``: ``torch.save`` would hide it."""
        try:
            self._write(self.held_back)
            self.held_back = bytes(part) if len(part) < self.SHORT else b""
            if not self.held_back:
                self._write(part)
        except OSError as error:
            self.failure = self.failure or error
        return len(part)

    def _write(self, part: bytes | memoryview) -> None:
        self.checksum.update(part)
        self.file.write(part)

    def flush(self) -> None:
        """Do nothing: the archive may not be complete."""

    def finish(self) -> None:
        """Write the end of the archive and the comment. Raise the OSError of this or an earlier write.

        Raise RuntimeError if the last part is not the end record of an archive without a comment.
        """
        if self.failure is not None:
            raise self.failure
        if len(self.held_back) != END_BYTES or not self.held_back.startswith(END_SIGNATURE):
            raise RuntimeError(f"torch.save of PyTorch {torch.__version__} does not write the end of the archive alone")
        self._write(self.held_back[:-2] + COMMENT_BYTES.to_bytes(2, "little"))
        self.file.write(_comment(self.checksum))


def write_state(state: Any, file: Writable) -> None:
    """Write the contents of a checkpoint file, a tensor at a time. Raise OSError if a write fails."""
    stream = _Stream(file)
    torch.save(state, stream)  # type: ignore[arg-type]  # it needs only write and flush
    stream.finish()


def to_bytes(state: Any) -> bytes:
    """Return the contents of a checkpoint file."""
    buffer = io.BytesIO()
    write_state(state, buffer)
    return buffer.getvalue()


class _Counter:
    """A file that counts the bytes written to it."""

    count = 0

    def write(self, part: bytes | memoryview) -> None:
        """Count a part."""
        self.count += len(part)


def count_bytes(state: Any) -> int:
    """Return the size of a checkpoint file of ``state`` without making one."""
    counter = _Counter()
    write_state(state, counter)
    return counter.count


def from_bytes(content: bytes) -> Any:
    """Load a checkpoint to CPU; see ``read_state``."""
    return read_state(io.BytesIO(content))


def read_state(file: BinaryIO) -> Any:
    """Load a checkpoint to CPU without executing any code in it. Raise ValueError if it is damaged, and OSError.

    The file is read twice, so that the state is in memory once: for the checksum, and by ``torch.load``. It is not
    mapped to memory: an error of the disk, or a file that another node replaces, would kill the process at any later
    access to a tensor.
    """
    if not is_intact(file):
        raise ValueError("its bytes do not match its checksum")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that is not a checkpoint
        raise ValueError("torch.load refuses it") from error


def is_intact(file: BinaryIO) -> bool:
    """Return whether the bytes of a checkpoint match its checksum. Raise OSError."""
    remaining, checksum = file.seek(0, os.SEEK_END) - COMMENT_BYTES, hashlib.sha256()
    file.seek(0)
    while remaining > 0 and (part := file.read(min(remaining, READ_BYTES))):
        checksum.update(part)
        remaining -= len(part)
    return remaining == 0 and file.read() == _comment(checksum)


def _comment(checksum: "hashlib._Hash") -> bytes:
    return COMMENT_PREFIX + checksum.hexdigest().encode()
