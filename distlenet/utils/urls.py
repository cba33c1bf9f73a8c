"""Paths that are URLs of an object store, such as ``s3://bucket/prefix``."""

import os
import re
import tempfile
from pathlib import Path

URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.+)")


def is_url(path: str | Path) -> bool:
    """Return whether ``path`` is in an object store. A ``Path`` never is: it would have lost a slash."""
    return isinstance(path, str) and URL.fullmatch(path) is not None


def join_url(url: str, *names: str) -> str:
    """Append names to a URL."""
    return "/".join([url.rstrip("/"), *names])


def temporary_directory() -> Path:
    """Return the directory for copies of objects on this machine: one per user, which ``TMPDIR`` moves."""
    return Path(tempfile.gettempdir(), f"distlenet-{os.getuid()}")


def local_copy_of(url: str, parent: str | Path) -> Path:
    """Return the path below ``parent`` for this machine's copy of ``url``."""
    scheme, rest = URL.fullmatch(url).groups()  # type: ignore[union-attr]  # the caller has checked it
    return Path(parent, scheme, *(name for name in rest.split("/") if name not in ("", ".", "..")))
