"""The ``Tracker`` interface, and ``Trackers``, which calls several trackers.

A record is one measurement, a flat dict: ``split`` (train, train_epoch, val or test), ``step`` (completed optimizer
steps), ``epoch`` (from 1), ``batch`` (completed steps of the epoch), ``loss`` (mean over samples), the task's metrics
(such as ``accuracy``, 0 to 1), ``count`` (number of samples), ``lr``, ``time`` (seconds since 1970). Train records also
have ``grad_norm`` of the last step, ``loss_scale`` with fp16, ``skipped_steps`` so far, if there are any,
``gpu_memory_gib`` (peak memory of rank 0's GPU), and what ``distlenet.training.throughput`` measures.
"""

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

TEST_FILE = "test.json"  # details of a run's last test; see distlenet.tasks.error_analysis
NETWORK_GRAPH_FILE, NETWORK_INPUTS_FILE = "graph.json", "inputs.png"  # of RUN/tensorboard: training.network_files
SPLITS = ("train", "train_epoch", "val", "test")  # in the order in which their records are logged after a step

NONDETERMINISTIC_KEYS = {
    *("time", "images_per_s", "load", "compute", "wait", "slowest_rank", "slowest_host", "gpu_memory_gib"),
    *(f"rank_images_per_s_{name}" for name in ("min", "median", "max")),
}
"""Keys of a record that depend on the machine; all others are equal in a second run."""

RESERVED_KEYS = NONDETERMINISTIC_KEYS | {
    *("split", "step", "epoch", "batch", "loss", "count", "lr", "grad_norm", "loss_scale", "skipped_steps"),
}
"""Keys of a record that are not metrics of the task; a metric cannot have such a name."""


def metrics_of(record: Record) -> dict[str, float]:
    """Return the metrics of the task in a record, by name, without the loss."""
    return {key: value for key, value in record.items() if key not in RESERVED_KEYS and isinstance(value, int | float)}


class Tracker:
    """A destination of rank 0's reports. Methods that a subclass does not define do nothing."""

    def start(self, run_info: Record) -> None:
        """Begin a run, or resume it from ``run_info["step"]``."""

    def log(self, record: Record) -> None:
        """Log one record."""

    def sync(self) -> None:
        """Make the logged records as durable as the checkpoint that is saved next."""

    def finish(self, summary: Record) -> None:
        """Log the summary of a complete run."""

    def close(self) -> None:
        """Release terminals and files. Called once, on every path."""


class Trackers(Tracker):
    """Call each of several trackers in order. Ranks other than 0 have none."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
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
