"""The log of each rank, ``RUN/logs/rank-00003.log``: warnings, the final traceback, and stacks on request.

``kill -URG PID`` (on SLURM ``scancel --signal=URG JOB``) makes a rank write the stacks of all threads, even in a hang.
SIGURG, because processes ignore it by default, and neither NCCL nor torchrun uses it.
"""

import contextlib
import faulthandler
import logging
import os
import platform
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import LOGGER, RANK_LOG, warn

LOGGED_VARIABLES = re.compile(
    r"(LOCAL_)?RANK|WORLD_SIZE|JOB_COMPLETION_INDEX|TORCH\w*|(MASTER|SLURM|NCCL|GLOO|CUDA|OMP|MKL|OMPI)_\w+"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|JWT|CRED|AUTH", re.IGNORECASE)


def dump_stacks_on_signal(file: TextIO) -> bool:
    """On SIGURG, and in a crash, write all stacks to ``file``. Do nothing if it has no file descriptor.

    Return whether those of a crash are: not if a fault handler is enabled already.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.register(signal.SIGURG, file=file, all_threads=True)
        if not faulthandler.is_enabled():
            faulthandler.enable(file=file)
            return True
    return False


def format_environment(environ: Mapping[str, str]) -> str:
    """Return the variables that affect the ranks, with secrets hidden."""
    names = sorted(name for name in environ if LOGGED_VARIABLES.fullmatch(name))
    return " ".join(f"{name}={'(hidden)' if SECRET.search(name) else environ[name]}" for name in names)


class RankLog:
    """The log file of one rank; before ``open`` and after ``close``, ``write`` does nothing."""

    def __init__(self, env: DistributedEnvironment, device: torch.device) -> None:
        self.env, self.device = env, device
        self.handler: logging.FileHandler | None = None
        self._handles_crashes = False  # the fault handler writes to the file, and must not outlive it

    def open(self, run_dir: Path) -> None:
        """Append to the rank's file in ``run_dir``; only warn if it cannot be written."""
        path = run_dir / "logs" / f"rank-{self.env.rank:05d}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror or error}")
            return
        self.handler.name = RANK_LOG
        self.handler.handleError = lambda _: None  # type: ignore[method-assign,assignment]  # a full disk is not a failure
        formatter = logging.Formatter("%(asctime)s.%(msecs)03d UTC %(message)s", "%Y-%m-%d %H:%M:%S")
        formatter.converter = time.gmtime
        self.handler.setFormatter(formatter)
        LOGGER.addHandler(self.handler)
        if self.handler.stream is not None:  # for mypy: the handler opens its file at once
            self._handles_crashes = dump_stacks_on_signal(self.handler.stream)
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        self.write(f"{self.env}, {self.device}, process {os.getpid()}, {versions}\n{format_environment(os.environ)}")

    def write(self, text: str) -> None:
        """Append ``text`` with the time."""
        if self.handler is not None:
            self.handler.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, text, (), None))

    def close(self) -> None:
        """Close the file."""
        if self.handler is not None:
            faulthandler.unregister(signal.SIGURG)
            if self._handles_crashes:
                faulthandler.disable()
                self._handles_crashes = False
            LOGGER.removeHandler(self.handler)
            with contextlib.suppress(OSError):  # the disk may be full
                self.handler.close()
            self.handler = None
