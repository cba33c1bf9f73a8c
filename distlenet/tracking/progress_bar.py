"""What a person sees of a run: on a terminal a progress bar, else plain lines (see ``lines``)."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distlenet.tracking.base import Record, Tracker
from distlenet.tracking.text import TextLogger, TutorialLogger, time_left

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
        return TutorialLogger()
    return ProgressBar() if sys.stdout.isatty() else TextLogger()


class ProgressBar(TextLogger):
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

    def start(self, run_info: Record) -> None:
        """Print what runs where and show the bar."""
        super().start(run_info)
        if not run_info["complete"]:
            self.task = self.progress.add_task("", total=run_info["steps"], completed=run_info["step"], numbers="")
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
        epoch = f"{record['epoch']}/{self.run_info['epochs']}"
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
            numbers = [f"{record['step']}/{self.run_info['steps']}", *numbers, f"acc {record['accuracy']:.1%}"]
        if width >= WIDE:
            numbers.append(f"{record['images_per_s']:,.0f} images/s")
        if width >= VERY_WIDE:
            numbers += [f"lr {record['lr']:.2g}", f"{self.run_info['world_size']} ranks"]
        return [*numbers, f"{time_left(record, self.run_info)} left"]

    def _row(self, tested: Record) -> None:
        """Print an evaluation, under a heading where it is the first."""
        trained = self.trained if self.trained.get("step") == tested["step"] else {}
        cells = {
            "epoch": f"{tested['epoch']}/{self.run_info['epochs']}",
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
