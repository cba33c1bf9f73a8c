"""Read a run that is in an object store: download what a command needs."""

import hashlib
from pathlib import Path

from filelock import FileLock

from distlenet.storage.objects import LOCKS, Objects
from distlenet.utils.errors import UserError
from distlenet.utils.step_names import in_order
from distlenet.utils.urls import is_url, join_url, local_copy_of, temporary_directory


def fetch_checkpoint(url: str) -> Path:
    """Return a local copy of the checkpoint ``url``, or of the newest one of the run ``url``.

    Raise UserError if there is none, or it cannot be read. Processes of one machine download it once.
    """
    if not url.endswith(".pt"):
        objects = Objects(url)
        names = in_order(objects.list("checkpoints") or objects.list())  # of a run, or of its directory checkpoints
        if not names:
            raise UserError(
                f"checkpoint {url}: has no checkpoints/step-*.pt; give a checkpoint file or a run directory"
            )
        url = join_url(url, names[-1])
    parent, _, name = url.rpartition("/")
    objects = Objects(parent)
    versions = objects.list(name)
    if not versions and name == "last.pt":
        raise UserError(f"checkpoint {url}: an object store has no last.pt; give the URL of the run")
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
    objects = Objects(url)
    names = [name for name in objects.list() if not name.startswith((f"{LOCKS}/", "checkpoints/"))]
    if not names:
        raise UserError(f"run {url}: has no files; give the URL of a run, run.dir and run.name joined by /")
    directory = _cache(url)
    with FileLock(directory / ".lock"):  # other commands may read the same run
        for name in names:
            objects.download(name, directory / name)
        for path in directory.rglob("*"):
            name = path.relative_to(directory).as_posix()
            if path.is_file() and name not in names and not _is_local(path.relative_to(directory)):
                path.unlink()  # of an earlier run of this URL
    return directory


def _is_local(path: Path) -> bool:
    """Return whether a command wrote a file, which is not of the store: a report, a lock, a checkpoint."""
    return path.name.startswith(".") or path.name == "report.html" or "checkpoints" in path.parts


def _cache(url: str) -> Path:
    """Return the directory for copies of what is in ``url``."""
    directory = local_copy_of(url, temporary_directory() / "fetched")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
