"""The versions of a model: directories with an integer as their name, each written completely or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distlenet.utils.errors import UserError
from distlenet.utils.files import sync_path
from distlenet.utils.version_names import version_of

TEMPORARY = ".exporting-"
MIN_AGE_S = 60.0  # of a temporary directory that is removed: a younger one may not be locked yet


class VersionDirectory:
    """A version that is being written."""

    def __init__(self, model: Path, path: Path) -> None:
        self.model, self.path = model, path  # the model's directory, and the temporary one

    def publish(self) -> Path:
        """Make the files durable and rename the directory to the next integer; return its path."""
        for directory, _, names in os.walk(self.path):
            for path in (*(os.path.join(directory, name) for name in names), directory):
                sync_path(Path(path))
        for number in itertools.count(max(versions(self.model), default=0) + 1):
            if version_of(str(number)) is None:
                raise UserError(f"--out {self.model}: has version {number - 1}, the largest; give another directory")
            target = self.model / str(number)
            try:
                os.rename(self.path, target)  # replaces no directory with files, as each version is
                break
            except OSError:
                if not target.exists():  # another export has not taken the number
                    raise
        sync_path(self.model)
        return target


@contextmanager
def new_version(model: Path) -> Iterator[VersionDirectory]:
    """Create a temporary directory in ``model``, which is removed at the end unless it was published.

    Raise UserError if it cannot be written.
    """
    existed = model.exists()
    try:
        model.mkdir(parents=True, exist_ok=True)
        _remove_stale(model)
        path = model / f"{TEMPORARY}{secrets.token_hex(8)}"
        path.mkdir()
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {model}: cannot be written: {error.strerror}; give another directory") from error
    with contextlib.suppress(OSError):  # a file system without locks: then nothing is removed there
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield VersionDirectory(model, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        place = f"--out {model}" if error.filename is None else error.filename
        raise UserError(f"{place}: cannot be read or written: {error.strerror}; check its disk") from error
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)
        if not existed:
            with contextlib.suppress(OSError):  # it has a version
                model.rmdir()


def versions(model: Path) -> list[int]:
    """Return the numbers of the versions in a model's directory."""
    return sorted(number for path in model.iterdir() if (number := version_of(path.name)) is not None)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_stale(model: Path) -> None:
    """Remove the temporary directories of processes that have ended."""
    for path in model.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):  # it is in use, has become a version, or is of another user
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > MIN_AGE_S:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
