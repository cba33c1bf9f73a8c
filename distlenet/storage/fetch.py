"""Read a run that is in an object store: download what a command needs."""

import hashlib
from pathlib import Path

from filelock import FileLock

from distlenet.storage.lock import LOCKS
from distlenet.storage.objects import Objects
from distlenet.utils.errors import UserError
from distlenet.utils.step_names import in_order
from distlenet.utils.urls import is_url, join_url, local_copy_of, temporary_directory


def fetch_checkpoint(url: str) -> Path:
    """Return a local copy of the checkpoint ``url``, or of the newest one of the run ``url``.

    Raise UserError if there is none, or it cannot be read. Processes of one machine download it once.
    """
    if not url.endswith(".pt"):
        names = in_order(Objects(url).list("checkpoints"))
        if not names:
            raise UserError(
                f"checkpoint {url}: has no checkpoints/step-*.pt; give a checkpoint file or a run directory"
            )
        url = join_url(url, names[-1])
    parent, _, name = url.rpartition("/")
    objects = Objects(parent)
    versions = objects.list(name)
    if not versions:
        raise UserError(f"checkpoint {url}: no such object; give a checkpoint file or a run directory")
    version = hashlib.sha256(versions[min(versions)].encode()).hexdigest()[:16]
    path = _cache(parent) / version / name
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.parent / ".lock"):
        if not path.exists():
            objects.download(name, path)
    return path


def fetch_run(url: str) -> Path:
    """Return a local copy of the run ``url``, without its checkpoints; ``Path(url)`` if it is not a URL.

    Raise UserError if it cannot be read.
    """
    if not is_url(url):
        return Path(url)
    objects, directory = Objects(url), _cache(url)
    names = [name for name in objects.list() if not name.startswith((f"{LOCKS}/", "checkpoints/"))]
    if not names:
        raise UserError(f"run {url}: has no files; give the URL of a run, run.dir and run.name joined by /")
    for name in names:
        objects.download(name, directory / name)
    return directory


def _cache(url: str) -> Path:
    """Return the directory for copies of what is in ``url``."""
    directory = local_copy_of(url, temporary_directory() / "fetched")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
