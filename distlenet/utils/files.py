"""Text files that a full disk, a kill or a power cut leaves whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlenet.utils.errors import UserError, warn


class LineFile:
    """Append whole lines to a file. Where a line cannot be written, it waits in memory for the next try.

    So a disk that is full for a while costs nothing, and no line stands in the file without those before it.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` for appending; make it where it is not there. Raises OSError."""
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.size = os.fstat(self.descriptor).st_size
        self.waiting = b""
        self.failure: OSError | None = None  # why they wait

    def add(self, line: str) -> None:
        """Append ``line``, whose end is added, or keep it waiting; the first time, say so."""
        self.waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Try to write what waits; the first time that it has to wait on, say so."""
        if not self.waiting:
            return
        told = self.failure is not None
        try:
            self._write(self.waiting)
        except OSError as error:
            self.failure = error
            if not told:
                warn(f"{self.path}: cannot be written: {error.strerror}; its lines wait in memory, training goes on")
        else:
            self.waiting, self.failure = b"", None

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:  # a disk may take a part first, and only then say why not the rest
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError:
            os.ftruncate(self.descriptor, self.size)  # no half line
            raise
        self.size += len(content)

    def sync(self) -> None:
        """Have everything on the disk; any thread may call it. Raises OSError where lines wait."""
        if (failure := self.failure) is not None:
            raise failure
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the file, after a last try."""
        self.flush()
        os.close(self.descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half. Raises OSError."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)  # what a kill has left, or a link to somewhere else
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run folder {folder}: cannot be written: {error.strerror or error}; mend that") from error
