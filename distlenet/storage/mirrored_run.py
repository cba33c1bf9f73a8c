"""Train a run that is in an object store."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from distlenet.storage.lease import LeaseLost
from distlenet.storage.mirror import RunMirror
from distlenet.storage.objects import Objects, StorageError
from distlenet.utils.errors import Preempted, UserError, warn


class StopRequest(Protocol):
    """Whether and until when this job must stop."""

    @property
    def status(self) -> int:
        """Exit status after the stop."""

    def request(self, by: str) -> None:
        """Request a stop because of ``by``."""

    def seconds_left(self) -> float:
        """Return the seconds until this job must exit."""


@contextmanager
def mirrored_run(
    mirror: RunMirror,
    patience_s: float,
    timeout_s: float,
    stop: StopRequest,
) -> Iterator[None]:
    """Lock and download a run for the block, upload what the block writes, and release the run.

    The upload at the end may take ``timeout_s``, and never more than ``stop`` leaves, which a stop request shortens;
    after an exception only that. Raise UserError if the run cannot be read or another job writes it, and at the end if
    not everything is uploaded; Preempted if a stop request is the reason. See ``RunMirror.open``.
    """
    mirror.open(patience_s, timeout_s, stop.request)
    copy = f"{mirror.directory} on {socket.gethostname()}"
    try:
        yield
    except BaseException:
        failure = mirror.close(stop.seconds_left())
        if isinstance(failure, LeaseLost):
            warn(f"{failure}; steps that only this job took are in {copy}, and are not uploaded")
        elif failure:
            warn(f"{failure}; the newest files are in {copy}: if the same command runs there, it resumes from them")
        raise
    if failure := mirror.close(timeout_s, stop.seconds_left):
        text = f"{failure}; the complete run is in {copy}: the same command there uploads it"
        raise UserError(text) if stop.seconds_left() > 0 else Preempted(text, stop.status)


def upload_report(url: str, run_dir: Path) -> None:
    """Upload the report, which is written after the run is released; a failure only warns."""
    try:
        Objects(url).upload(run_dir / "report.html", "report.html")
    except StorageError as error:
        warn(f"{error}; the report is in {run_dir}")
