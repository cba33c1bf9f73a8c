"""Send a run's records to W&B, MLflow, TensorBoard and Prometheus from a separate process.

The process (``distlenet.tracking.sender``) cannot slow or stop the training. ``metrics.jsonl`` is its source: it reads
that file again and again. At each start of the run it begins with the first line, and each service gets the records
that it does not have yet.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distlenet.tracking.base import Record, Tracker
from distlenet.tracking.mlflow import CLIENT_DEFAULTS, mlflow_tracking_uri
from distlenet.tracking.priority import process_tree
from distlenet.tracking.wandb import has_key, wandb_mode, writable_directories
from distlenet.utils.errors import Preempted, UserError, warn

NAMES = {"prometheus": "Prometheus", "wandb": "W&B", "mlflow": "MLflow", "tensorboard": "TensorBoard"}
"""Names in messages. All but the first are packages."""
INSTALLED_BY = {"mlflow": "'distlenet[mlflow]'", "tensorboard": "'distlenet[tensorboard]'"}  # else the package itself
TURNED_OFF_BY = {
    "wandb": "wandb.mode=disabled",
    "mlflow": "mlflow.enabled=false",
    "tensorboard": "tracking.tensorboard=false",
}
EXIT_S = 2.0  # of a preempted job's remaining time, kept for its exit


class Sidecar(Tracker):
    """Start the process, send it the run's start and outcome, and wait for it at the end for a limited time."""

    def __init__(self, run_dir: Path, config: dict[str, Any], seconds_left: Callable[[], float]) -> None:
        """Prepare for the run in ``run_dir``; ``seconds_left`` returns the time until this job is killed.

        Raise UserError if a package that the settings require is not installed, or no MLflow server is given.
        """
        self.run_dir, self.config, self.seconds_left = run_dir, config, seconds_left
        self.wandb_mode = wandb_mode(config["wandb"]["mode"], os.environ)
        self.sinks = ["wandb"] * (self.wandb_mode != "disabled")
        if config["mlflow"]["enabled"]:
            mlflow_tracking_uri(config["mlflow"]["tracking_uri"], os.environ)
            self.sinks.append("mlflow")
        self.sinks += ["tensorboard"] * bool(config["tracking"]["tensorboard"])
        for package in self.sinks:
            if importlib.util.find_spec(package) is None:
                install = f"pip install {INSTALLED_BY.get(package, package)}"
                raise UserError(f"package {package}: is not installed; {install}, or give {TURNED_OFF_BY[package]}")
        if config["tracking"]["prometheus"] is not None:
            self.sinks.insert(0, "prometheus")  # first: the others may wait for a server
        self.names = " and ".join(NAMES[package] for package in self.sinks)
        self.process: subprocess.Popen[bytes] | None = None
        self.started = False
        self.outcome = "failed"

    def launch(self) -> None:
        """Start the process: it imports its packages while the ranks initialize, so training does not wait for it."""
        if not self.sinks:
            return
        if self.config["wandb"]["mode"] == "online" and not has_key(os.environ):
            warn("wandb.mode=online: no API key is configured, so the run is kept offline; wandb login adds one")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distlenet.tracking.sender", str(self.run_dir), *self.sinks],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                process_group=0,  # a terminal's Ctrl-C is for the training
                env={
                    **CLIENT_DEFAULTS,
                    **os.environ,
                    **writable_directories(os.environ, self.run_dir / "wandb"),
                    "WANDB_SILENT": "true",
                    "WANDB_MODE": self.wandb_mode,
                },
            )
        except OSError as error:
            warn(f"{self.names}: cannot be started: {error.strerror}; training continues without")

    def start(self, run_info: Record) -> None:
        """Send what the process needs to begin; a complete run has nothing to send."""
        if not run_info["complete"] and self.process is not None and self.process.stdin is not None:
            job = {"run_info": run_info, "config": self.config, "sinks": self.sinks, "wandb_mode": self.wandb_mode}
            with suppress(OSError):  # it has ended: close() reports that
                self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.started = True

    def finish(self, summary: Record) -> None:  # noqa: ARG002
        """Record that the run is complete."""
        self.outcome = "finished"

    def close(self) -> None:
        """Send the outcome, and wait until everything is sent, for at most ``wandb.finish_timeout_s``."""
        sender, self.process = self.process, None  # closed once, also if Ctrl-C interrupts the wait
        if sender is None:
            return
        problem = ""
        try:
            problem = self._wait(sender) if self.started else ""
        finally:
            for process in reversed(process_tree(sender.pid)):  # a surviving process would keep standard error open
                with suppress(OSError, psutil.Error):
                    process.kill()
            sender.wait()
        if problem:
            fix = f": python -m distlenet.report {self.run_dir} --replay-wandb" * ("wandb" in self.sinks)
            warn(f"{self.names}: the process that sends the records {problem}; nothing is lost{fix}")

    def _wait(self, process: subprocess.Popen[bytes]) -> str:
        """Send the outcome and wait; return what went wrong, or an empty string."""
        left = self.seconds_left()
        if isinstance(sys.exception(), Preempted):
            self.outcome = "preempted"
            left = min(left, self.config["checkpoint"]["preemption_grace_s"])  # the signal may be another rank's
        finish_timeout_s = self.config["wandb"]["finish_timeout_s"]
        limit = max(0.0, min(finish_timeout_s, left - EXIT_S))
        try:
            # A whole line: a process forked by this one may keep the pipe open, so its end may not arrive.
            process.communicate(f"{self.outcome}\n".encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            reason = "wandb.finish_timeout_s" if limit == finish_timeout_s else "a stop was requested"
            return f"was not done within {limit:.3g} s ({reason})"
        return f"ended with status {process.returncode}" if process.returncode else ""
