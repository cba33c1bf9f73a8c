"""Each rank's own log, ``RUN/logs/rank-00003.log``: its warnings, what ended it, and where it is when asked.

``kill -URG PID`` (on SLURM ``scancel --signal=URG JOB``) has a rank write every thread's stack there, also one that
hangs in a collective; before the log is open, to standard error. SIGURG, because a process that does not know it
ignores it, and neither NCCL, torchrun nor this package's preemption uses it.
"""

import contextlib
import faulthandler
import logging
import os
import platform
import re
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

import torch

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import LOGGER, warn

STACKS = signal.SIGURG
ENVIRONMENT = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_\w+|TORCH\w*|SLURM_\w+|NCCL_\w+|GLOO_\w+|CUDA_\w+|OMP_\w+|MKL_\w+|OMPI_\w+)"
)
"""The variables that a log begins with: those that change how ranks meet and compute."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|JWT|CRED|AUTH", re.IGNORECASE)


def dump_stacks_on_signal(file: TextIO) -> None:
    """Have ``STACKS``, and crashes, print every thread's stack to ``file``; nothing, where that has no descriptor."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        faulthandler.register(STACKS, file=file, all_threads=True)
        if not faulthandler.is_enabled():
            faulthandler.enable(file=file)


def shown(environ: Mapping[str, str]) -> str:
    """Write the variables that matter to ranks, without the secrets among them."""
    names = sorted(name for name in environ if ENVIRONMENT.fullmatch(name))
    return " ".join(f"{name}={'(hidden)' if SECRET.search(name) else environ[name]}" for name in names)


class RankLog:
    """Writes to nothing until it is opened."""

    def __init__(self, env: DistributedEnvironment, device: torch.device) -> None:
        """Be the log of a rank."""
        self.env, self.device = env, device
        self.handler: logging.FileHandler | None = None

    def open(self, run: Path) -> None:
        """Append to the rank's file in the run folder; where that cannot be, warn and go on."""
        path = run / "logs" / f"rank-{self.env.rank:05d}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror or error}")
            return
        handler.handleError = lambda _: None  # type: ignore[method-assign,assignment]  # a full disk ends no training
        formatter = logging.Formatter("%(asctime)s.%(msecs)03d UTC %(message)s", "%Y-%m-%d %H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        LOGGER.addHandler(handler)
        self.handler = handler
        if handler.stream is not None:
            dump_stacks_on_signal(handler.stream)
        where = f"rank {self.env.rank} of {self.env.world_size} on {socket.gethostname()}, {self.device}"
        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        self.write(f"{where}, process {os.getpid()}, {versions}\n{shown(os.environ)}")

    def write(self, text: str) -> None:
        """Append ``text``, with the time before it."""
        if self.handler is not None:
            self.handler.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, text, (), None))

    def close(self) -> None:
        """Close the file."""
        if self.handler is not None:
            faulthandler.unregister(STACKS)
            LOGGER.removeHandler(self.handler)
            with contextlib.suppress(OSError):  # what a full disk did not take
                self.handler.close()
            self.handler = None
