"""A text file with the newest numbers of a run, for Prometheus: node_exporter's textfile collector reads it.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlenet.tracking.base import Record, metrics_of
from distlenet.utils.files import replace_text

STATES = ("running", "finished", "preempted", "failed")
HELP = {
    "distlenet_state": "1 for the state of the run, 0 for the others.",
    "distlenet_step": "Completed optimizer steps.",
    "distlenet_steps": "Optimizer steps of the whole run.",
    "distlenet_epoch": "Epoch of the newest record, from 1.",
    "distlenet_loss": "Mean loss over the samples of the split's newest record.",
    "distlenet_metric": "Metric of the task in the split's newest record, such as accuracy, 0 to 1.",
    "distlenet_learning_rate": "Learning rate.",
    "distlenet_samples_per_second": "Training samples per second, of all ranks.",
    "distlenet_restarts_total": "Starts of the run after the first one.",
    "distlenet_skipped_steps_total": "Steps that were skipped because something was not finite.",
    "distlenet_last_record_timestamp_seconds": "Time of the newest record, in seconds since 1970.",
}
"""Names of the metrics in the file, in its order, and what they mean."""


class Prometheus:
    """Keep the newest numbers of a run in a file. A reader gets the old or the new file."""

    def __init__(self, run_dir: Path, config: dict[str, Any], run_info: Record) -> None:
        """Write the file of a run that has no new record yet. Raise OSError if it cannot be written."""
        self.path = Path(config["tracking"]["prometheus"])
        self.labels = {"run": run_dir.name, "slurm_job_id": os.environ.get("SLURM_JOB_ID", "")}
        self.samples: dict[str, float] = {}  # by metric and labels, as the file has them
        self.written = ""
        for key in ("step", "steps"):
            self._set(key, run_info[key])
        for key in ("restarts", "skipped_steps"):
            self._set(f"{key}_total", run_info[key])
        self._set_state("running")
        self.flush()

    def put(self, record: Record) -> None:
        """Keep the numbers of one record until the next ``flush``."""
        numbers = {
            "step": record["step"],
            "epoch": record["epoch"],
            "learning_rate": record.get("lr"),
            "samples_per_second": record.get("images_per_s"),
            "skipped_steps_total": record.get("skipped_steps"),
            "last_record_timestamp_seconds": record["time"],
        }
        for key, value in numbers.items():
            self._set(key, value)
        self._set("loss", record["loss"], split=record["split"])
        for name, value in metrics_of(record).items():
            self._set("metric", value, split=record["split"], name=name)

    def flush(self) -> None:
        """Replace the file, if a number changed."""
        text = render(self.samples)
        if text != self.written:
            replace_text(self.path, text, durable=False)  # waiting for the disk would delay training
            self.written = text

    def mark_replayed(self) -> None:
        """Do nothing: the file has the newest record only."""

    def finish(self, outcome: str, summary: Record, details: Record) -> None:  # noqa: ARG002
        """Write the outcome, which is finished, preempted or failed. The file stays."""
        self._set_state(outcome)
        self.flush()

    def _set(self, key: str, value: float | None, **labels: str) -> None:
        if value is not None:  # else a number that is not finite, or that this record does not have
            self.samples[sample_name(f"distlenet_{key}", self.labels | labels)] = value

    def _set_state(self, state: str) -> None:
        for each in STATES:
            self._set("state", int(each == state), state=each)


def sample_name(metric: str, labels: Mapping[str, str]) -> str:
    """Return a metric and its labels in Prometheus's text format."""
    escaped = {key: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, text in labels.items()}
    return metric + "{" + ",".join(f'{key}="{text}"' for key, text in escaped.items()) + "}"


def render(samples: Mapping[str, float]) -> str:
    """Return the file with ``samples``, values by ``sample_name``, grouped by metric."""
    lines = []
    for metric, text in HELP.items():
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {'counter' if metric.endswith('_total') else 'gauge'}"]
        lines += [f"{name} {value!r}" for name, value in samples.items() if name.startswith(metric + "{")]
    return "".join(f"{line}\n" for line in lines)
