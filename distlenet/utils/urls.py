"""Paths that are URLs of an object store, such as ``s3://bucket/prefix``."""

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from distlenet.utils.errors import UserError

URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.+)")


def is_url(path: str | Path) -> bool:
    """Return whether ``path`` is in an object store. A ``Path`` never is: it would have lost a slash."""
    return isinstance(path, str) and URL.fullmatch(path) is not None


def url_problem(url: str) -> str:
    """Return what prevents the use of a URL; "" if nothing does. fsspec would read these as its own syntax."""
    return next((f"{text} cannot be a part of a URL; remove it" for text in ("::", "?versionId=") if text in url), "")


def join_url(url: str, *names: str) -> str:
    """Append names to a URL."""
    return "/".join([url.rstrip("/"), *names])


def temporary_directory() -> Path:
    """Make the directory for copies of objects, which only this user can read; ``TMPDIR`` moves it. Return it.

    Raise UserError if another user made it, or it is not a directory.
    """
    path = Path(tempfile.gettempdir(), f"distlenet-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(f"{path}: is not a directory of this user alone; remove it, set TMPDIR or give run.local_dir")
    return path


def local_copy_of(url: str, parent: str | Path) -> Path:
    """Return the path below ``parent`` for this machine's copy of ``url``."""
    scheme, rest = URL.fullmatch(url).groups()  # type: ignore[union-attr]  # the caller has checked it
    return Path(parent, scheme, *(name for name in rest.split("/") if name not in ("", ".", "..")))
