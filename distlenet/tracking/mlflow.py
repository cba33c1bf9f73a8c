"""MLflow: one MLflow run per job, whose metrics are the numbers of ``metrics.jsonl`` over optimizer steps.

The run is found again by its tag ``distlenet.run_id``. The metric ``SPLIT/step`` shows which records MLflow has.
Source: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html
"""

import importlib.util
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlenet.tracking.base import SPLITS, Record
from distlenet.tracking.wandb import environment
from distlenet.utils.errors import UserError

RUN_ID_TAG = "distlenet.run_id"
MAX_METRICS = 1000  # of one request; https://mlflow.org/docs/latest/api_reference/rest-api.html#log-batch
MAX_PARAMS = 100
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # begin the URI of a database
STATUSES = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # W&B and TensorBoard wait meanwhile, and by default for many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Environment variables of MLflow's client, unless the user has set them."""


def mlflow_tracking_uri(given: str | None, environ: Mapping[str, str]) -> str:
    """Resolve ``mlflow.tracking_uri``: null follows MLFLOW_TRACKING_URI. Raise UserError if neither is usable."""
    source = "mlflow.tracking_uri" if given else "MLFLOW_TRACKING_URI"
    uri = given or environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "mlflow.enabled=true: no server is given; set MLFLOW_TRACKING_URI, or give mlflow.tracking_uri, such as "
            "http://HOST:5000"
        )
    if given and re.search(r"://[^/@]*:[^/@]*@", given):
        raise UserError(
            "mlflow.tracking_uri: contains a password, and settings are saved and sent; set MLFLOW_TRACKING_URI instead"
        )
    if "://" not in uri and not uri.startswith(("file:", "databricks")):  # MLflow takes HOST:PORT for a directory
        raise UserError(f"{source}: contains no ://; expected http://HOST:PORT")
    if uri.startswith(DATABASES) and not all(map(importlib.util.find_spec, ("sqlalchemy", "alembic"))):
        raise UserError(f"{source}: a database needs more than the package mlflow-skinny; pip install mlflow")
    return uri


class Mlflow:
    """Send a run's records to MLflow."""

    def __init__(self, run_dir: Path, config: dict[str, Any], run_info: Record) -> None:
        """Begin the run, or resume the one of ``run_info["run_id"]``. Raise an exception of MLflow if that fails."""
        import mlflow
        from mlflow import entities

        self.entities = entities
        settings = config["mlflow"]
        mlflow.set_tracking_uri(mlflow_tracking_uri(settings["tracking_uri"], os.environ))
        name = settings["experiment"] or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "distlenet"
        experiment = mlflow.set_experiment(name).experiment_id  # created if it does not exist
        self.client = mlflow.MlflowClient()
        tag = f"tags.`{RUN_ID_TAG}` = '{run_info['run_id']}'"
        found = self.client.search_runs([experiment], tag, max_results=1)
        if found:
            run = found[0]
            self.client.update_run(run.info.run_id, "RUNNING")
        else:
            tags = {RUN_ID_TAG: run_info["run_id"]} | {k: _text(v) for k, v in environment(run_info).items()}
            run = self.client.create_run(experiment, tags=tags, run_name=run_dir.name)
        self.run_id = run.info.run_id
        self.sent = {split: run.data.metrics.get(f"{split}/step", -1) for split in SPLITS}
        self.pending: list[Any] = []
        if not run.data.params:  # later values of a resumed run may differ, and MLflow refuses to change one
            self._log_params(config)

    def _log_params(self, config: dict[str, Any]) -> None:
        params = [self.entities.Param(key, _text(value)) for key, value in _flatten(config)]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MAX_PARAMS])

    def put(self, record: Record) -> None:
        """Send one record with the next ``flush``, unless MLflow has it."""
        split, step = record["split"], record["step"]
        if step > self.sent[split]:
            numbers = {f"{split}/{key}": value for key, value in record.items() if key not in ("step", "time")}
            numbers[f"{split}/step"] = step  # last: a local store writes one after another
            self._add(numbers, step, record["time"])
            self.sent[split] = step

    def _add(self, numbers: Record, step: int, time_s: float) -> None:
        metrics = [
            self.entities.Metric(re.sub(r"[^\w.\- /]", "_", key), value, int(1000 * time_s), step)
            for key, value in numbers.items()
            if isinstance(value, int | float)
        ]
        if len(self.pending) + len(metrics) > MAX_METRICS:
            self.flush()
        self.pending += metrics

    def flush(self) -> None:
        """Send what was put, in one request: a server takes milliseconds for each."""
        if self.pending:
            self.client.log_batch(self.run_id, metrics=self.pending)
        self.pending = []

    def mark_replayed(self) -> None:
        """Do nothing: no earlier start left anything to remove."""

    def finish(self, outcome: str, summary: Record, details: Record) -> None:  # noqa: ARG002
        """End the run; ``outcome`` is finished, preempted or failed."""
        if summary:
            self._add({f"summary/{key}": value for key, value in summary.items()}, summary["steps"], time.time())
        self.flush()
        self.client.set_terminated(self.run_id, STATUSES[outcome])


def _flatten(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the settings by their dotted keys."""
    for group, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{group}.{key}", inner) for key, inner in value.items())
        else:
            yield group, value


def _text(value: Any) -> str:
    """Return a setting as MLflow's text, of a length that all its servers accept."""
    return str(value)[:500]
