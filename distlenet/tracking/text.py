"""What a person reads of a run in a file or a pipe: plain lines, or the tutorial's."""

import os
import sys
import time
from datetime import timedelta

from distlenet.tracking.base import Record
from distlenet.utils.errors import warn

SECONDS_BETWEEN_LINES = 5.0
SLOW = 1.15
"""How many times longer than the median a rank must compute, for PATIENCE records in a row, to be named."""
PATIENCE = 5


class TextLogger:
    """One plain line for the start, for each test, and for training at most every few seconds."""

    def __init__(self) -> None:
        """Print to standard output."""
        self.run_info: Record = {}
        self.printed = float("-inf")
        self.slow: list[int] = []  # the slowest rank of the last records, where it was slow
        self.named: set[int] = set()

    def start(self, run_info: Record) -> None:
        """Print what runs where."""
        self.run_info = run_info
        for line in opening(run_info):
            self.print(line)

    def log(self, record: Record) -> None:
        """Print a record, unless a training line was printed a moment ago."""
        self.watch(record)
        if record["split"] == "test":
            self.print(_test_line(record, self.run_info))
        elif record["split"] == "train" and time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            self.print(
                f"epoch {record['epoch']}/{self.run_info['epochs']}  step {record['step']}/{self.run_info['steps']}  "
                f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.1%}  lr {record['lr']:.4g}  "
                f"{record['images_per_s']:,.0f} images/s  {time_left(record, self.run_info)} left"
            )

    def watch(self, record: Record) -> None:
        """Name a rank that is slow all the time, once."""
        if record.get("slowest_rank") is None:
            return
        times = record["rank_images_per_s_median"] / record["rank_images_per_s_min"]
        self.slow = [*self.slow, record["slowest_rank"]][-PATIENCE:] if times >= SLOW else []
        if len(self.slow) == PATIENCE and len(set(self.slow)) == 1 and self.slow[0] not in self.named:
            self.named.add(self.slow[0])
            self.print(
                f"rank {self.slow[0]} on {record['slowest_host']} computes {times - 1:.0%} longer than the median, "
                "and all wait for it"
            )

    def sync(self) -> None:
        """Nothing is kept."""

    def finish(self, summary: Record) -> None:
        """Print the result and where the files are."""
        for line in _closing(summary):
            self.print(line)

    def close(self) -> None:
        """Nothing is held."""

    def print(self, line: str) -> None:
        """Print one line, at once. When nobody reads any more (``| head``, a full disk), training goes on unheard."""
        try:
            print(line, flush=True)
        except OSError as error:
            warn(f"standard output is gone ({error.strerror}); see metrics.jsonl")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TutorialLogger(TextLogger):
    """What PyTorch's "Training a Classifier" tutorial prints: ``[1,  2000] loss: 1.234``."""

    def log(self, record: Record) -> None:
        """Print the mean loss of the batches since the last line."""
        if record["split"] == "train":
            self.print(f"[{record['epoch']}, {record['batch']:5d}] loss: {record['loss']:.3f}")

    def finish(self, summary: Record) -> None:
        """Print the tutorial's last lines."""
        self.print("Finished Training")
        super().finish(summary)


def opening(run_info: Record) -> list[str]:
    """Write what runs where, how its batches are cut, and from which step it goes on."""
    f = run_info
    lines = [
        f"distlenet {f['version']}: {f['model']} on {f['data']} ({f['train_count']} images, {f['data_source']})",
        f"world size {f['world_size']}, {f['backend']}, {f['device']}, {f['precision']}, "
        f"threads per rank {f['threads']}, reduction {f['reduction']}, W&B {f['wandb']}",
        f"epochs {f['epochs']}, steps {f['steps']}, global batch {f['global_batch_size']} = "
        f"ranks {f['world_size']} × micro-batches {f['micro_batches']} × images {f['micro_batch_size']}",
    ]
    if run_info["complete"]:
        lines.append(
            f"this run is complete; to train on: run.name={f['run']} checkpoint.allow_changed=[train.epochs] "
            "and more train.epochs; to train anew: another run.name"
        )
    elif run_info["step"]:
        lines.append(f"resumed at step {f['step']} of {f['steps']} from {f['resumed_from']}")
    return lines


def _test_line(record: Record, run_info: Record) -> str:
    return (
        f"epoch {record['epoch']}/{run_info['epochs']}  test loss {record['loss']:.4f}  "
        f"test accuracy {record['accuracy']:.2%} of {record['count']} images"
    )


def _closing(summary: Record) -> list[str]:
    speed = summary["train_images_per_s"]  # None where the run was complete already
    trained = f"trained at {speed:,.0f} images/s, " if speed else ""
    return [
        accuracy_line(summary["test_accuracy"], summary["test_count"]),
        f"{summary['start_s']:.1f} s to start, {trained}{summary['wall_s']:.1f} s in all",
        f"Files of this run: {summary['folder']}",
    ]


def accuracy_line(accuracy: float, count: int) -> str:
    """Write a test accuracy (0 to 1) the way PyTorch's tutorial does."""
    return f"Accuracy of the network on the {count} test images: {100 * accuracy:.1f} %"


def time_left(record: Record, run_info: Record) -> timedelta:
    """Return how long the rest of the run takes at the speed of ``record``, in whole seconds."""
    images = (run_info["steps"] - record["step"]) * run_info["train_count"] / run_info["steps_per_epoch"]
    return timedelta(seconds=round(images / max(record["images_per_s"], 1e-9)))
