"""Console output for files and pipes: plain lines, or the lines of PyTorch's tutorial."""

import os
import sys
import time
from datetime import timedelta

from distlenet.tracking.base import Record, Tracker, metrics_of
from distlenet.utils.errors import warn

LINE_INTERVAL_S = 5.0  # between two lines of training
SLOW_RATIO = 1.15  # a rank is slow if it computes this many times longer than the median,
SLOW_RECORDS = 5  # for this many records in a row


class TextLogger(Tracker):
    """Print a line at the start, for each evaluation, and for training at most every LINE_INTERVAL_S."""

    def __init__(self) -> None:
        self.run_info: Record = {}
        self.unit = "samples"  # what the samples are called
        self.last_line_time = float("-inf")
        self.slow_ranks: list[int] = []  # the slowest rank of each of the last records, if it was slow
        self.reported_ranks: set[int] = set()

    def start(self, run_info: Record) -> None:
        """Print the configuration of the run, and the step from which it resumes."""
        self.run_info = i = run_info
        self.unit = i["unit"]
        what = f"{i['model']} on {i['data']}" if i["data"] else i["model"]
        source = f", {i['data_source']}" if i["data_source"] else ""
        self.print(
            f"distlenet {i['version']}: {what} ({i['train_count']} {self.unit}{source})\n"
            f"world size {i['world_size']}, {i['backend']}, {i['device']}, {i['precision']}, "
            f"threads per rank {i['threads']}, reduction {i['reduction']}, W&B {i['wandb']}\n"
            f"epochs {i['epochs']}, steps {i['steps']}, global batch {i['global_batch_size']} = "
            f"ranks {i['world_size']} × micro-batches {i['micro_batches']} × {self.unit} {i['micro_batch_size']}"
        )
        if i["global_batch_size"] > i["train_count"]:
            self.print(
                f"train.global_batch_size={i['global_batch_size']} is larger than the training set: each epoch is one "
                f"step, of {i['train_count']} {self.unit}"
            )
        restart = i.get("restart", "")
        if i["complete"]:
            by_steps = i["steps"] < i["epochs"] * i["steps_per_epoch"]
            limit = "train.max_steps" if by_steps else "train.epochs"
            limit = "train.stop_patience" if i.get("stopped_early") else limit
            self.print(
                f"this run is complete; to train longer, give run.name={i['run']} "
                f"checkpoint.allow_changed=[{limit}] and a larger {limit}; to train again, another run.name"
            )
        elif i["step"]:
            which = f" ({restart})" if restart else ""
            self.print(f"resumed at step {i['step']} of {i['steps']} from {i['resumed_from']}{which}")
        elif i["initialised_from"]:
            self.print(f"initial weights from {i['initialised_from']}")
        if restart and not i["step"]:
            self.print(f"{restart}, from the beginning: there is no checkpoint yet")

    def log(self, record: Record) -> None:
        """Print a record; a training record only if no other was printed just before."""
        self.report_slow_rank(record)
        epoch = f"epoch {record['epoch']}/{self.run_info['epochs']}"
        if record["split"] in ("val", "test"):
            self.print(f"{epoch}  {format_metrics(record, prefix=record['split'])} of {record['count']} {self.unit}")
        elif record["split"] == "train" and time.monotonic() - self.last_line_time >= LINE_INTERVAL_S:
            self.last_line_time = time.monotonic()
            self.print(
                f"{epoch}  step {record['step']}/{self.run_info['steps']}  {format_metrics(record, digits=1)}  "
                f"lr {record['lr']:.4g}  "
                f"{record['images_per_s']:,.0f} {self.unit}/s  {time_left(record, self.run_info)} left"
            )

    def report_slow_rank(self, record: Record) -> None:
        """Print a line, once, about a rank that is slow for SLOW_RECORDS records in a row."""
        rank = record.get("slowest_rank")
        if rank is None:
            return
        ratio = record["rank_images_per_s_median"] / record["rank_images_per_s_min"]
        self.slow_ranks = [*self.slow_ranks, rank][-SLOW_RECORDS:] if ratio >= SLOW_RATIO else []
        if self.slow_ranks == [rank] * SLOW_RECORDS and rank not in self.reported_ranks:
            self.reported_ranks.add(rank)
            self.print(
                f"rank {rank} on {record['slowest_host']} computes {ratio - 1:.0%} longer than the median, "
                "and all ranks wait for it"
            )

    def finish(self, summary: Record) -> None:
        """Print the result, the times and the run directory."""
        speed = summary["train_images_per_s"]  # None if the run was complete at its start
        trained = f"trained at {speed:,.0f} {self.unit}/s, " if speed else ""
        if summary.get("stopped_early"):
            self.print(f"stopped early after step {summary['steps']}: train.stop_when did not improve")
        if "best_step" in summary:
            self.print(f"best.pt: step {summary['best_step']}, {summary['best_by']} {summary['best_value']:.4f}")
        self.print(result_line(summary, unit=self.unit))
        self.print(f"{summary['start_s']:.1f} s to start, {trained}{summary['wall_s']:.1f} s in all")
        self.print(f"Files of this run: {summary.get('run_url') or summary['run_dir']}")

    def print(self, text: str) -> None:
        """Print text immediately. If nothing can be written (``| head``, a full disk), training continues."""
        try:
            print(text, flush=True)
        except OSError as error:
            warn(f"standard output cannot be written ({error.strerror}); see metrics.jsonl")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TutorialLogger(TextLogger):
    """Print what PyTorch's "Training a Classifier" tutorial prints: ``[1,  2000] loss: 1.234``."""

    def log(self, record: Record) -> None:
        """Print the mean loss of the batches since the last line."""
        if record["split"] == "train":
            self.print(f"[{record['epoch']}, {record['batch']:5d}] loss: {record['loss']:.3f}")

    def finish(self, summary: Record) -> None:
        """Print the tutorial's last lines."""
        self.print("Finished Training")
        super().finish(summary)


def result_line(metrics: Record, split: str = "test", unit: str = "samples") -> str:
    """Format the metrics of a split, ``test_loss`` and so on; only the accuracy if there is one, as in the tutorial."""
    values = {key.removeprefix(f"{split}_"): value for key, value in metrics.items() if key.startswith(f"{split}_")}
    name = {"val": "validation"}.get(split, split)
    if "accuracy" not in values:
        return f"The network on the {values['count']} {name} {unit}: {format_metrics(values)}"
    return f"Accuracy of the network on the {values['count']} {name} {unit}: {100 * values['accuracy']:.1f} %"


def format_metrics(record: Record, prefix: str = "", digits: int = 2) -> str:
    """Format the loss and the metrics of a record; ``prefix`` is written before each name."""
    texts = [f"loss {record['loss']:.4f}"]
    texts += [f"{name} {format_metric(name, value, digits)}" for name, value in metrics_of(record).items()]
    return "  ".join(f"{prefix} {text}".lstrip() for text in texts)


def format_metric(name: str, value: float, digits: int = 2) -> str:
    """Format an accuracy in percent, with ``digits`` decimals, and other values with four."""
    return f"{value:.{digits}%}" if name == "accuracy" else f"{value:.4f}"


def time_left(record: Record, run_info: Record) -> timedelta:
    """Return the remaining time of the run at the speed of ``record``, in full seconds."""
    samples = (run_info["steps"] - record["step"]) * run_info["train_count"] / run_info["steps_per_epoch"]
    return timedelta(seconds=round(samples / max(record["images_per_s"], 1e-9)))
