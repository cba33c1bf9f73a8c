"""What a person sees: a progress bar on a terminal, plain lines in a file, or the tutorial's lines."""

import os
import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distlenet.errors import warn
from distlenet.tracking import Record, Tracker

SECONDS_BETWEEN_LINES = 5.0
SLOW = 1.15
"""How many times longer than the median a rank must compute, for PATIENCE records in a row, to be named."""
PATIENCE = 5
NARROW = 60
"""Columns below which there is room for the loss and the time left alone."""
WIDE = 78
"""Columns from which a progress bar has room for the speed, too."""
VERY_WIDE = 110
"""And for the learning rate and the number of ranks."""
CELL = 9
"""Letters of a cell in the table of evaluations, or more where its heading has more."""


def make_console(style: str) -> Tracker:
    """Choose by ``run.console`` (auto or tutorial) and by whether standard output is a terminal."""
    if style == "tutorial":
        return TutorialLines()
    return Bar() if sys.stdout.isatty() else Lines()


class Lines:
    """One plain line for the start, for each test, and for training at most every few seconds."""

    def __init__(self) -> None:
        """Print to standard output."""
        self.facts: Record = {}
        self.printed = float("-inf")
        self.slow: list[int] = []  # the slowest rank of the last records, where it was slow
        self.named: set[int] = set()

    def start(self, facts: Record) -> None:
        """Print what runs where."""
        self.facts = facts
        for line in _opening(facts):
            self.print(line)

    def log(self, record: Record) -> None:
        """Print a record, unless a training line was printed a moment ago."""
        self.watch(record)
        if record["split"] == "test":
            self.print(_test_line(record, self.facts))
        elif record["split"] == "train" and time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            self.print(
                f"epoch {record['epoch']}/{self.facts['epochs']}  step {record['step']}/{self.facts['steps']}  "
                f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.1%}  lr {record['lr']:.4g}  "
                f"{record['images_per_s']:,.0f} images/s  {_time_left(record, self.facts)} left"
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


class Bar(Lines):
    """A live progress bar for training; a table of all evaluations, and the other lines, scroll above it.

    A narrow terminal gets less of it, each on one line. rich writes no colours where NO_COLOR is set.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Print to the terminal of standard output, or to ``console``."""
        super().__init__()
        self.console = console or Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            expand=True,
        )
        self.task: TaskID | None = None
        self.last: Record = {}  # of training
        self.trained: Record = {}  # the last epoch's training
        self.columns: list[str] = []  # of the table; none before its first row

    def start(self, facts: Record) -> None:
        """Print what runs where and show the bar."""
        super().start(facts)
        if not facts["complete"]:
            self.task = self.progress.add_task("", total=facts["steps"], completed=facts["step"], numbers="")
            self.progress.start()

    def log(self, record: Record) -> None:
        """Move the bar, or print a row of the table above it."""
        if record["split"] == "train" and self.task is not None:
            self.watch(record)
            self.last = record
            self.show(record)
        elif record["split"] == "train_epoch":
            self.trained = record
        elif record["split"] == "test":
            self._row(record)

    def show(self, record: Record) -> None:
        """Move the bar to a training record."""
        assert self.task is not None
        epoch = f"{record['epoch']}/{self.facts['epochs']}"
        self.progress.update(
            self.task,
            completed=record["step"],
            description=f"epoch {epoch}" if self.console.width >= WIDE else epoch,
            numbers="  ".join(self._numbers(record)),
        )

    def _numbers(self, record: Record) -> list[str]:
        """Write what stands beside the bar; on a narrow terminal, less of it."""
        width = self.console.width
        numbers = [f"loss {record['loss']:.3f}"]
        if width >= NARROW:
            numbers = [f"{record['step']}/{self.facts['steps']}", *numbers, f"acc {record['accuracy']:.1%}"]
        if width >= WIDE:
            numbers.append(f"{record['images_per_s']:,.0f} images/s")
        if width >= VERY_WIDE:
            numbers += [f"lr {record['lr']:.2g}", f"{self.facts['world_size']} ranks"]
        return [*numbers, f"{_time_left(record, self.facts)} left"]

    def _row(self, tested: Record) -> None:
        """Print an evaluation, under a heading where it is the first."""
        trained = self.trained if self.trained.get("step") == tested["step"] else {}
        cells = {
            "epoch": f"{tested['epoch']}/{self.facts['epochs']}",
            "step": f"{tested['step']}",
            "train loss": f"{trained['loss']:.4f}" if trained else "",  # of no part of an epoch
            "train acc": f"{trained['accuracy']:.2%}" if trained else "",
            "test loss": f"{tested['loss']:.4f}",
            "test acc": f"{tested['accuracy']:.2%}",
            "test images": f"{tested['count']}",
        }
        if not self.columns:
            few = self.console.width < WIDE
            self.columns = ["epoch", "test loss", "test acc"] if few else list(cells)
            self.print("  ".join(f"{name:>{CELL}}" for name in self.columns))
        self.print("  ".join(f"{cells[name]:>{max(CELL, len(name))}}" for name in self.columns))

    def finish(self, summary: Record) -> None:
        """Complete the bar and print the result below it."""
        if self.task is not None and self.last:
            self.show({**self.last, "step": summary["steps"]})
        self.close()
        super().finish(summary)

    def close(self) -> None:
        """Give the terminal back."""
        self.progress.stop()

    def print(self, line: str) -> None:
        """Print one line above the bar."""
        self.console.print(line, markup=False, soft_wrap=True)


class TutorialLines(Lines):
    """What PyTorch's "Training a Classifier" tutorial prints: ``[1,  2000] loss: 1.234``."""

    def log(self, record: Record) -> None:
        """Print the mean loss of the batches since the last line."""
        if record["split"] == "train":
            self.print(f"[{record['epoch']}, {record['batch']:5d}] loss: {record['loss']:.3f}")

    def finish(self, summary: Record) -> None:
        """Print the tutorial's last lines."""
        self.print("Finished Training")
        super().finish(summary)


def _opening(facts: Record) -> list[str]:
    f = facts
    lines = [
        f"distlenet {f['version']}: {f['model']} on {f['data']} ({f['train_count']} images, {f['data_source']}); "
        f"world size {f['world_size']}, {f['backend']}, {f['device']}, {f['precision']}, "
        f"CPU threads per rank {f['threads']}",
        f"epochs {f['epochs']}, steps per epoch {f['steps_per_epoch']}, global batch {f['global_batch_size']} = "
        f"ranks {f['world_size']} × micro-batches {f['micro_batches']} × images {f['micro_batch_size']}, "
        f"reduction {f['reduction']}, W&B {f['wandb']}",
    ]
    if facts["complete"]:
        lines.append("this run is complete; raise train.epochs to train on, or give another run.name to train anew")
    elif facts["step"]:
        lines.append(f"resumed at step {f['step']} of {f['steps']} from {f['resumed_from']}")
    return lines


def _test_line(record: Record, facts: Record) -> str:
    return (
        f"epoch {record['epoch']}/{facts['epochs']}  test loss {record['loss']:.4f}  "
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


def _time_left(record: Record, facts: Record) -> timedelta:
    images = (facts["steps"] - record["step"]) * facts["train_count"] / facts["steps_per_epoch"]
    return timedelta(seconds=round(images / max(record["images_per_s"], 1e-9)))
