"""Console output for a terminal: a progress bar, with a table of the evaluations above it."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distlenet.tracking.base import Record, Tracker, metrics_of
from distlenet.tracking.text import TextLogger, TutorialLogger, format_metric, time_left

NARROW, WIDE, VERY_WIDE = 60, 78, 110  # columns of a terminal from which the bar shows more numbers
CELL = 9  # minimum width of a column of the table


def make_console(style: str) -> Tracker:
    """Choose by ``run.console`` (auto or tutorial) and by whether standard output is a terminal."""
    if style == "tutorial":
        return TutorialLogger()
    return ProgressBar() if sys.stdout.isatty() else TextLogger()


class ProgressBar(TextLogger):
    """Show a live progress bar for training; the table of evaluations and the other lines scroll above it.

    On a narrow terminal they show fewer numbers, so that each still fits on a line. rich respects NO_COLOR.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(highlight=False)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[numbers]}")
        self.progress = Progress(*columns, console=self.console, expand=True)
        self.task: TaskID | None = None
        self.last_train: Record = {}
        self.last: dict[str, Record] = {}  # the last record of each split, except train
        self.columns: list[str] = []  # the heading of the table, once it is printed

    def start(self, run_info: Record) -> None:
        """Print the configuration and show the bar."""
        super().start(run_info)
        if not run_info["complete"]:
            self.task = self.progress.add_task("", total=run_info["steps"], completed=run_info["step"], numbers="")
            self.progress.start()

    def log(self, record: Record) -> None:
        """Update the bar, or print a row of the table above it."""
        if record["split"] == "train":
            self.report_slow_rank(record)
            self.last_train = record
            self._update_bar(record)
            return
        self.last[record["split"]] = record
        if record["split"] == "test":
            self._print_row(record)

    def _update_bar(self, record: Record) -> None:
        if self.task is None:
            return
        width, info = self.console.width, self.run_info
        numbers = [  # the minimum width for each
            (NARROW, f"{record['step']}/{info['steps']}"),
            (0, f"loss {record['loss']:.3f}"),
            *((NARROW, f"{label(name)} {format_metric(name, value, 1)}") for name, value in first_metric(record)),
            (WIDE, f"{record['images_per_s']:,.0f} {self.unit}/s"),
            (VERY_WIDE, f"lr {record['lr']:.2g}  {info['world_size']} ranks"),
            (0, f"{time_left(record, info)} left"),
        ]
        self.progress.update(
            self.task,
            completed=record["step"],
            description="epoch " * (width >= WIDE) + f"{record['epoch']}/{info['epochs']}",
            numbers="  ".join(number for minimum, number in numbers if width >= minimum),
        )

    def _print_row(self, test: Record) -> None:
        """Print the loss and the first metric of each split."""
        cells = {"epoch": f"{test['epoch']}/{self.run_info['epochs']}", "step": f"{test['step']}"}
        for split in ("train_epoch", "val", "test"):
            record, name = self.last.get(split, {}), split.removesuffix("_epoch")
            if split == "val" and not record:
                continue
            known = record.get("step") == test["step"]  # the epoch may not have ended
            cells[f"{name} loss"] = f"{record['loss']:.4f}" if known else ""
            for metric, _ in first_metric(test):
                shown = known and metric in record  # the training set has no metrics over all predictions
                cells[f"{name} {label(metric)}"] = format_metric(metric, record[metric]) if shown else ""
        cells[f"test {self.unit}"] = f"{test['count']}"
        if not self.columns:
            self.columns = self._choose_columns(list(cells))
            self.print("  ".join(f"{name:>{CELL}}" for name in self.columns))
        self.print("  ".join(f"{cells[name]:>{max(CELL, len(name))}}" for name in self.columns))

    def _choose_columns(self, columns: list[str]) -> list[str]:
        """Choose the columns of the table that fit into the terminal."""
        selecting = "val" if "val loss" in columns else "test"
        if self.console.width < WIDE:
            return [
                "epoch",
                *(name for name in columns if name.startswith(f"{selecting} ") and name != f"test {self.unit}"),
            ]
        if selecting == "val" and self.console.width < VERY_WIDE:
            return [name for name in columns if name not in ("step", f"test {self.unit}")]
        return columns

    def finish(self, summary: Record) -> None:
        """Complete the bar and print the result below it."""
        if self.last_train:
            self._update_bar({**self.last_train, "step": summary["steps"]})
        self.close()
        super().finish(summary)

    def close(self) -> None:
        """Restore the terminal."""
        self.progress.stop()

    def print(self, text: str) -> None:
        """Print text above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)


def first_metric(record: Record) -> list[tuple[str, float]]:
    """Return name and value of the first metric; an empty list if the task has none."""
    return list(metrics_of(record).items())[:1]


def label(name: str) -> str:
    """Return a short name of a metric."""
    return {"accuracy": "acc"}.get(name, name[:CELL])
