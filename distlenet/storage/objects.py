"""The objects below one URL, through fsspec."""

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from distlenet.storage.connection import BEFORE_SEND, connect
from distlenet.utils.errors import UserError, one_line, printable, warn
from distlenet.utils.urls import join_url, url_problem

T = TypeVar("T")

LOCKS = ".locks"  # the objects of locks, which messages do not name: users know only the run
PERMANENT = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ImportError, ValueError)
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0


class StorageError(UserError):
    """An operation of the object store failed; ``permanent`` if the same request will fail again."""

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class Objects:
    """The objects below ``url``, named by their path relative to it. All methods raise StorageError.

    A write is atomic: a reader gets the old object or the new one. Short failures are repeated by fsspec's package, but
    not in ``upload``: its caller must first check that the run is still its own.
    """

    def __init__(self, url: str) -> None:
        """Connect to nothing yet. Raise UserError if no package for the scheme is installed."""
        self.url = url
        if problem := url_problem(url):
            raise UserError(f"{url}: {problem}")
        try:
            self.fs, root = connect(url)
            self.fs_once, _ = connect(url, once=True)
        except ImportError as error:
            fix = "; pip install 'distlenet[s3]'" * url.startswith("s3:")
            raise UserError(f"{url}: a package is missing: {error}{fix}") from error
        except ValueError as error:
            raise UserError(f"{url}: {error}; expected s3://, or another scheme that fsspec knows") from error
        self.root = root.rstrip("/")

    def list(self, prefix: str = "") -> dict[str, str]:
        """Return the objects in the directory ``prefix``, at any depth: by name, what identifies their content."""
        with self._convert_errors(prefix):
            found = self.fs.find(self._path(prefix), detail=True, refresh=True)
            return {
                name: str(entry.get("ETag", entry.get("etag", entry["size"])))
                for path, entry in found.items()
                # without the empty objects that consoles make for directories, and names outside the directory
                if (name := path.removeprefix(self.root).strip("/"))
                and path == self._path(name)
                and ".." not in name.split("/")
            }

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        with self._convert_errors(name):
            content: bytes = self.fs.cat_file(self._path(name))
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write an object."""
        with self._convert_errors(name):
            self.fs.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> None:
        """Write an object unless it exists."""
        with self._convert_errors(name):
            try:
                self.fs.pipe_file(self._path(name), content, mode="create")
            except OSError as error:
                answer = getattr(error.__cause__, "response", {}).get("Error", {})  # some servers name no condition
                if not isinstance(error, FileExistsError) and answer.get("Code") != "PreconditionFailed":
                    raise

    def upload(self, path: Path, name: str, check: Callable[[], None] = lambda: None) -> None:
        """Write an object from a file, in one attempt.

        Call ``check``, which may raise, before each request and after each part of the file.
        """
        from fsspec.callbacks import Callback

        token = BEFORE_SEND.set(check)  # fsspec's thread receives the context of this one
        try:
            with self._convert_errors(name):
                callback = Callback(hooks={"check": lambda *_: check()})
                self.fs_once.put_file(str(path), self._path(name), callback=callback)
        finally:
            BEFORE_SEND.reset(token)

    def download(self, name: str, path: Path) -> None:
        """Read an object into a file, atomically."""
        temporary = path.with_name(f".{path.name}.downloading")
        with self._convert_errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(self._path(name), str(temporary))
                temporary.replace(path)
            finally:  # on a full disk, a part of a file would stay
                temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove an object; do nothing if there is none."""
        with self._convert_errors(name):
            try:
                self.fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    @contextmanager
    def _convert_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except StorageError:  # of ``check``
            raise
        except Exception as error:  # the packages of the stores raise many types
            reason = (printable(one_line(error)) or type(error).__name__).rstrip(".")
            fix = _fix(error)
            url = self.url if not name or name.startswith(LOCKS) else join_url(self.url, name)
            raise StorageError(f"{url}: {reason}{fix}", permanent=fix != "") from error


def _fix(error: Exception) -> str:
    """Return how to fix an error that the same request would meet again; "" for others."""
    if isinstance(error, OSError) and (error.errno in FULL_DISK or (error.errno == errno.EACCES and error.filename)):
        return "; this is the local disk: check its space and permissions, or set TMPDIR or run.local_dir"
    if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") == "NoSuchBucket":
        return "; create the bucket, or correct the URL"
    if type(error).__name__ in CREDENTIALS:
        return "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return "; check the URL and the credentials" if isinstance(error, PERMANENT) else ""


def retry(operation: Callable[[], T], seconds: float) -> T:
    """Return the result of ``operation``; repeat it for up to ``seconds`` if it fails and may succeed later.

    Raise the StorageError of the last attempt.
    """
    deadline, delay, warned = time.monotonic() + seconds, FIRST_DELAY_S, False
    while True:
        try:
            return operation()
        except StorageError as error:
            if error.permanent:
                raise
            if time.monotonic() + delay > deadline:
                raise StorageError(f"{error}; check the network and the address of the server") from error
            if not warned:
                warn(f"{error}; trying again for up to {seconds:.0f} s")
            warned = True
        time.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(2 * delay, LONGEST_DELAY_S)
