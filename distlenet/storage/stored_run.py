"""Train a run that is in an object store."""

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from distlenet.storage.local_copy import LocalCopy, is_needed, signature
from distlenet.storage.lock import LockLost, RunLock
from distlenet.storage.objects import Objects, StorageError, retry
from distlenet.storage.upload import Upload
from distlenet.utils.errors import Preempted, UserError, warn
from distlenet.utils.files import convert_io_errors
from distlenet.utils.step_names import in_order

REPORT_UPLOAD_TIMEOUT_S = 10.0


class StopRequest(Protocol):
    """Whether and until when this job must stop."""

    @property
    def status(self) -> int:
        """Exit status after the stop."""

    def seconds_left(self) -> float:
        """Return the seconds until this job must exit."""


def open_run(
    url: str,
    directory: Path,
    keep_last: int,
    is_intact: Callable[[Path], bool],
    patience_s: float,
    timeout_s: float,
    lost: Callable[[str], None],
) -> Upload:
    """Lock the run for this job, make ``directory``, which this job has locked, its newest state, and start the upload.

    Wait up to ``patience_s`` for a run that another job is writing, and up to ``timeout_s`` for a store that does not
    answer. ``is_intact`` checks a checkpoint. ``lost`` is called with the cause if another job takes over the run.
    Raise StorageError, or UserError if the directory cannot be written.
    """
    objects = Objects(url)
    with convert_io_errors(directory):
        copy = LocalCopy(directory)
        lock = RunLock(objects, copy.id, lost)
        complete = retry(lambda: lock.acquire(patience_s), timeout_s)
        try:
            present = retry(objects.list, timeout_s)
            copy.uploaded = {name: copy.uploaded.get(name) for name in present}
            if complete and copy.has_all(present):  # only this directory has changed since
                retry(lambda: _repair(objects, copy, present, is_intact), timeout_s)
            else:
                copy.change_id()
                retry(lambda: lock.describe(copy.id, complete=False), timeout_s)
                if aside := copy.set_aside(f"before-{lock.number:08d}"):
                    if any(map(is_needed, present)):
                        warn(f"{directory}: is older than {url}; the local files are moved to {aside}")
                    else:
                        warn(f"{directory}: {url} has no files of this run; the local files are moved to {aside}")
                retry(lambda: _download(objects, copy, present, is_intact), timeout_s)
                retry(lambda: lock.describe(copy.id, complete=True), timeout_s)
            copy.save()
        except BaseException:
            with contextlib.suppress(StorageError):
                lock.release()
            raise
    return Upload(objects, copy, lock, keep_last)


def _download(objects: Objects, copy: LocalCopy, present: Iterable[str], is_intact: Callable[[Path], bool]) -> None:
    """Download the run, of the checkpoints the best and the newest undamaged one."""

    for name in filter(is_needed, present):
        _download_file(objects, copy, name)
    for name in reversed(in_order(present)):
        if is_intact(_download_file(objects, copy, name)):
            break


def _repair(objects: Objects, copy: LocalCopy, present: Iterable[str], is_intact: Callable[[Path], bool]) -> None:
    """Download again what is damaged on this disk, since it would replace the undamaged object, or lose steps."""

    def download(name: str) -> Path:
        path = _download_file(objects, copy, name)
        warn(f"{path}: is damaged, or older than in {objects.url}; downloaded again")
        return path

    for name in filter(is_needed, present):
        if copy.has_shrunk(name) or (name == "checkpoints/best.pt" and not is_intact(copy.directory / name)):
            download(name)
    on_disk = set(map(copy.object_name, copy.checkpoints()[1]))
    for name in reversed(in_order(on_disk.union(present))):
        if name in on_disk and is_intact(copy.directory / name):
            break
        if name in present and is_intact(download(name)):
            break


def _download_file(objects: Objects, copy: LocalCopy, name: str) -> Path:
    """Download one object, and return its path."""
    path = copy.directory / name
    objects.download(name, path)
    copy.uploaded[name] = signature(path)
    return path


@contextmanager
def closing_upload(upload: Upload, timeout_s: float, stop: StopRequest) -> Iterator[None]:
    """Upload what the block writes, and release the run.

    The final upload may take ``timeout_s``, but no longer than ``stop.seconds_left()``; after an exception, it may take
    ``stop.seconds_left()``. Raise UserError at the end if not everything is uploaded; Preempted if a stop request or
    another job, which has taken over the run, is the reason.
    """
    copy = f"{upload.copy.directory} on {socket.gethostname()}"
    lost = f"steps that only this job took are in {copy}, and are not uploaded"
    try:
        yield
    except BaseException:
        failure = upload.close(stop.seconds_left())
        if isinstance(failure, LockLost):
            warn(f"{failure}; {lost}")
        elif failure:
            warn(f"{failure}; the newest files are in {copy}: if the same command runs there, it resumes from them")
        raise
    if failure := upload.close(timeout_s, stop.seconds_left):
        if isinstance(failure, LockLost):  # the thread of the lock may not have requested a stop yet
            raise Preempted(f"{failure}; {lost}", stop.status)
        text = f"{failure}; the complete run is in {copy}: the same command there uploads it"
        raise UserError(text) if stop.seconds_left() > 0 else Preempted(text, stop.status)


def upload_report(url: str, run_dir: Path) -> None:
    """Upload the report, which is written after the run is released; a failure only warns."""
    try:
        retry(lambda: Objects(url).upload(run_dir / "report.html", "report.html"), REPORT_UPLOAD_TIMEOUT_S)
    except StorageError as error:
        warn(f"{error}; the report is in {run_dir}")
