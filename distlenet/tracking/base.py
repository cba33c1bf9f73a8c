"""Where the numbers of a run go: one protocol, and a tracker that passes them on to several.

A record is one measurement, a flat dict: ``split`` (train, train_epoch or test), ``step`` (optimizer
steps done), ``epoch`` (from 1), ``batch`` (steps done in it), ``loss`` (nats per image), ``accuracy``
(0 to 1), ``count`` (images behind it), ``lr``, ``time`` (seconds since 1970); for train also ``grad_norm`` of
the last step, ``loss_scale`` with fp16, ``gpu_memory_gib`` (the most of rank 0's GPU that was ever taken), and
what ``distlenet.training.throughput`` measures.
"""

from collections.abc import Sequence
from typing import Any, Protocol

Record = dict[str, Any]

TEST_FILE = "test.json"
"""What a run's last test says beyond its two numbers; see ``distlenet.training.error_analysis``."""

SPLITS = ("train", "train_epoch", "test")
"""The kinds of records, in the order in which they come after a step."""

NONDETERMINISTIC_KEYS = {
    *("time", "images_per_s", "load", "compute", "wait", "slowest_rank", "slowest_host", "gpu_memory_gib"),
    *(f"rank_images_per_s_{name}" for name in ("min", "median", "max")),
}
"""What a record says of the machine; all else in it a second run says again."""


class Tracker(Protocol):
    """What a trainer tells. Ranks other than 0 hold a tracker that tells nobody."""

    def start(self, run_info: Record) -> None:
        """Open: the run_info of the run, and ``step``, from which it goes on."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def sync(self) -> None:
        """Make what was told so far as durable as the checkpoint that is saved next."""

    def finish(self, summary: Record) -> None:
        """Take the summary of a run that reached its end."""

    def close(self) -> None:
        """Let go of terminals and files; called once, on every path."""


class Trackers:
    """Pass everything on to each of several trackers, in their order; with none, to nobody."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        """Pass on to ``trackers``."""
        self.trackers = trackers

    def start(self, run_info: Record) -> None:
        """See ``Tracker``."""
        for tracker in self.trackers:
            tracker.start(run_info)

    def log(self, record: Record) -> None:
        """See ``Tracker``."""
        for tracker in self.trackers:
            tracker.log(record)

    def sync(self) -> None:
        """See ``Tracker``."""
        for tracker in self.trackers:
            tracker.sync()

    def finish(self, summary: Record) -> None:
        """See ``Tracker``."""
        for tracker in self.trackers:
            tracker.finish(summary)

    def close(self) -> None:
        """See ``Tracker``."""
        for tracker in self.trackers:
            tracker.close()
