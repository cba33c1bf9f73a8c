"""Files that stay consistent through a full disk, a kill or a power cut."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from distlenet.utils.errors import UserError, warn

TEMP_PREFIX = ".writing-"  # of the names of temporary files


class LineFile:
    """A file to which complete lines are appended.

    Lines that cannot be written stay in memory until the next attempt. So a temporarily full disk loses no line, and
    the file never contains a line without its predecessors.
    """

    def __init__(self, path: Path) -> None:
        """Open or create ``path``. Raise OSError if that fails."""
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.size = os.fstat(self.descriptor).st_size
        self.pending = b""
        self.failure: OSError | None = None  # why lines are pending

    def add(self, line: str) -> None:
        """Append ``line`` and a newline, or keep them pending."""
        self.pending += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Try to write the pending lines. Warn at the first failure."""
        rest = memoryview(self.pending)
        try:
            while rest:  # a full disk may accept a part before it reports the error
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.size)  # remove the incomplete line
            if self.failure is None:
                warn(f"{self.path}: cannot be written: {error.strerror}; its lines stay in memory, training continues")
            self.failure = error
        else:
            self.size += len(self.pending)
            self.pending, self.failure = b"", None

    def sync(self) -> None:
        """Write all lines to the disk. Raise OSError if lines are pending. Any thread may call it."""
        if (failure := self.failure) is not None:
            raise failure
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        os.close(self.descriptor)


def sync_path(path: Path) -> None:
    """Make a file, or the names of a directory, durable. Raise OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a text file as ``replace_atomically``. Raise OSError."""
    replace_atomically(path, lambda file: file.write(text.encode()), durable)


def replace_atomically(path: Path, write: Callable[[BinaryIO], object], durable: bool = True) -> None:
    """Write a file with ``write``. A reader gets the old or the new file, also if several processes replace it at once.

    If ``durable``, this is also true after a power cut, but the call waits for the disk. Raise OSError.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        sync_path(path.parent)


@contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a temporary directory, and remove those with this prefix, of killed processes.

    The caller holds a lock, so that no other process uses one. Raise OSError.
    """
    for path in parent.glob(f"{prefix}*"):
        shutil.rmtree(path, ignore_errors=True)
    with TemporaryDirectory(prefix=prefix, dir=parent) as scratch:
        yield Path(scratch)


def temporary_path(path: Path) -> Path:
    """Return a new path in the directory of ``path``, which begins with ``TEMP_PREFIX``."""
    return path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(8)}")


@contextmanager
def convert_io_errors(run_dir: Path, fix: str = "check its disk and permissions") -> Iterator[None]:
    """Convert an OSError to a UserError that names the run directory."""
    try:
        yield
    except OSError as error:
        failure = f"cannot be written: {error.strerror or error}"
        raise UserError(f"run directory {run_dir}: {failure}; {fix}") from error
