"""W&B and TensorBoard, off the training's path: a process of its own sends on what ``metrics.jsonl`` says.

``metrics.jsonl`` is the truth, and it is cut back when a run goes on from a checkpoint (see ``History``). The process
that mirrors it starts anew with each start of the run, and gives each tracker what that does not have yet. So a run
that was killed shows each step once, and a tracker that is slow, down or wrong costs training nothing.
"""

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from distlenet.tracking.base import Record
from distlenet.tracking.wandb import has_key, wandb_mode
from distlenet.utils.errors import Preempted, UserError, warn

NAMES = {"wandb": "W&B", "tensorboard": "TensorBoard"}
"""What users call the packages."""

SPARE_S = 2.0
"""What a job that was asked to stop keeps of its time for leaving."""


class Sidecar:
    """Starts the process, tells it when there is more, and at the end waits for it, but not for long."""

    def __init__(self, folder: Path, config: dict[str, Any], seconds_left: Callable[[], float]) -> None:
        """Sidecar the run in ``folder``; ``seconds_left`` says how long this job may still take, infinity where
        nobody has asked it to stop.

        Raises UserError where a package is missing that the settings ask for.
        """
        self.folder, self.config, self.seconds_left = folder, config, seconds_left
        self.wandb_mode = wandb_mode(config["wandb"]["mode"], os.environ)
        self.wanted = []
        if self.wandb_mode != "disabled":
            self.wanted.append("wandb")
        if config["tracking"]["tensorboard"]:
            self.wanted.append("tensorboard")
        for package in self.wanted:
            if importlib.util.find_spec(package) is None:
                setting = "wandb.mode=disabled" if package == "wandb" else "tracking.tensorboard=false"
                raise UserError(f"package {package}: is not installed; pip install {package}, or give {setting}")
        self.names = " and ".join(NAMES[package] for package in self.wanted)
        self.told = False  # whether the process knows what to send
        self.process: subprocess.Popen[bytes] | None = None
        self.outcome = "failed"

    def launch(self) -> None:
        """Start the process: it imports what it needs while the ranks meet, so that training need not wait for it."""
        if not self.wanted:
            return
        if self.config["wandb"]["mode"] == "online" and not has_key(os.environ):
            warn("wandb.mode=online: no API key is configured, so the run is kept offline; wandb login adds one")
        command = [sys.executable, "-m", "distlenet.tracking.sender", str(self.folder), *self.wanted]
        try:
            # A session of its own: Ctrl-C is for the training, whose end the process sees by its standard input.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "WANDB_SILENT": "true", "WANDB_MODE": self.wandb_mode},
            )
        except OSError as error:
            warn(f"{self.names}: cannot be started: {error.strerror}; training goes on without")

    def start(self, run_info: Record) -> None:
        """Tell the process what to send; of a run that is complete, nothing."""
        if run_info["complete"] or self.process is None:
            return
        start = {"run_info": run_info, "config": self.config, "sinks": self.wanted, "wandb_mode": self.wandb_mode}
        self.told = True
        self._tell(json.dumps(start))
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)

    def log(self, record: Record) -> None:  # noqa: ARG002
        """Say that there is more."""
        self._tell("more")

    def sync(self) -> None:
        """Nothing is kept here."""

    def finish(self, summary: Record) -> None:  # noqa: ARG002
        """Note that the run reached its end."""
        self.outcome = "finished"

    def close(self) -> None:
        """Say how the run ended, and wait until that is sent, ``wandb.finish_timeout_s`` at most."""
        if self.process is None:
            return
        why = self._finish() if self.told else ""
        if self.process.poll() is None:
            end(self.process)
        self.process = None
        if why:
            mend = f": python -m distlenet.report {self.folder} --replay-wandb" * ("wandb" in self.wanted)
            warn(f"{self.names}: what sends the records {why}; nothing is lost{mend}")

    def _finish(self) -> str:
        """Say how the run ended, and wait; return what went wrong."""
        assert self.process is not None
        assert self.process.stdin is not None
        if isinstance(sys.exception(), Preempted):
            self.outcome = "preempted"
        pipe = select.poll()
        pipe.register(self.process.stdin, select.POLLOUT)
        pipe.poll(1e3 * SPARE_S / 2)  # this line must not find it full
        self._tell(self.outcome)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        left = self.seconds_left()
        if self.outcome == "preempted":  # perhaps by a signal to another rank
            left = min(left, self.config["checkpoint"]["preemption_grace_s"])
        finish_timeout_s = self.config["wandb"]["finish_timeout_s"]
        limit = max(0.0, min(finish_timeout_s, left - SPARE_S))
        try:
            return f"ended with status {status}" if (status := self.process.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            reason = "wandb.finish_timeout_s" if limit == finish_timeout_s else "the job was asked to stop"
            return f"was not done within {limit:.3g} s ({reason})"

    def _tell(self, line: str) -> None:
        """Write a line to the process; one that is gone, or does not read, misses it."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                os.write(self.process.stdin.fileno(), line.encode() + b"\n")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started, in whatever groups; one that lived on would hold standard error open."""
    below = []
    with contextlib.suppress(OSError, psutil.Error):
        below = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in below:
        with contextlib.suppress(OSError, psutil.Error):
            other.kill()
    process.wait()
