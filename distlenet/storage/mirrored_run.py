"""Train a run that is in an object store."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distlenet.storage.lease import LeaseLost
from distlenet.storage.mirror import RunMirror
from distlenet.storage.objects import Objects, StorageError
from distlenet.utils.errors import Preempted, UserError, warn


@contextmanager
def mirrored_run(
    mirror: RunMirror,
    patience_s: float,
    timeout_s: float,
    seconds_left: Callable[[], float],
    lost: Callable[[str], None],
) -> Iterator[None]:
    """Lock and download a run for the block, upload what the block writes, and release the run.

    The upload at the end may take ``timeout_s``, and never more than ``seconds_left()``, which a stop request shortens;
    after an exception only that. Raise UserError if the run cannot be read or another job writes it, and at the end if
    not everything is uploaded; Preempted if a stop request is the reason. See ``RunMirror.open``.
    """
    mirror.open(patience_s, timeout_s, lost)
    copy = f"{mirror.directory} on {socket.gethostname()}"
    try:
        yield
    except BaseException:
        failure = mirror.close(seconds_left())
        if isinstance(failure, LeaseLost):
            warn(f"{failure}; steps that only this job took are in {copy}, and are not uploaded")
        elif failure:
            warn(f"{failure}; the newest files are in {copy}: if the same command runs there, it resumes from them")
        raise
    if failure := mirror.close(timeout_s, seconds_left):
        error = UserError if seconds_left() > 0 else Preempted
        raise error(f"{failure}; the complete run is in {copy}: the same command there uploads it")


def upload_report(url: str, run_dir: Path) -> None:
    """Upload the report, which is written after the run is released; a failure only warns."""
    try:
        Objects(url).upload(run_dir / "report.html", "report.html")
    except StorageError as error:
        warn(f"{error}; the report is in {run_dir}")
