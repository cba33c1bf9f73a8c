"""Asked to stop, by SIGTERM or SIGUSR2: remember it until all ranks know, then save and leave.

A scheduler warns a job before it takes the machine away, and not all ranks hear it, or not at the same step. So a
signal only sets a flag here; it travels with what the ranks exchange in each step anyway (see
``distlenet.reduction``), and all of them see it after the same step.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from distlenet.utils.process import exit_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not USR1, which NCCL may take


class Preemption:
    """Whether this rank was asked to stop, and since when."""

    def __init__(self, preemption_grace_s: float) -> None:
        """Allow ``preemption_grace_s`` seconds from the signal to the end."""
        self.preemption_grace_s = preemption_grace_s
        self.asked_by: str | None = None
        self.deadline = float("inf")
        self.before: dict[int, Any] = {}  # the handlers

    def listen(self) -> None:
        """Take the signals from now on."""
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Take a signal. The second is as good as none: the first may already be at work."""
        if self.asked_by is None:
            self.deadline = time.monotonic() + self.preemption_grace_s
            self.asked_by = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether a signal came to this rank."""
        return self.asked_by is not None

    def seconds_left(self) -> float:
        """Return the seconds until this rank should be gone; all of ``preemption_grace_s`` where it was not asked itself."""
        return max(0.0, min(self.deadline - time.monotonic(), self.preemption_grace_s))


@contextmanager
def handle_preemption(preemption_grace_s: float) -> Iterator[Preemption]:
    """Have a Preemption, which may ``listen`` to the end of a ``with`` block; then the handlers before it come back."""
    preemption = Preemption(preemption_grace_s)
    try:
        yield preemption
    finally:
        for number, handler in preemption.before.items():
            signal.signal(number, handler)


@contextmanager
def block_signals() -> Iterator[None]:
    """Let the signals wait until the end of a ``with`` block; for a process forked in it, until ``worker_init_fn``.

    torch gives a new worker a handler of its own for SIGTERM, which ends it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_init_fn(_: int = 0) -> None:
    """Prepare a loader's worker process: its rank needs it to the last step, so only the rank ends it.

    Python does so by SIGTERM where a rank leaves with workers still there, and waits until they are gone.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_parents_sigterm, daemon=True).start()
    exit_with_parent()


def _end_at_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class StopFlag:
    """Whether any rank was asked to stop: read on the host, without making the device wait.

    On a GPU a value is looked at ``LAG`` steps after it was computed: it is there by then, and every rank looks at
    the same step's.
    """

    LAG = 4

    def __init__(self, device: torch.device) -> None:
        """Read from ``device``."""
        self.yes = False
        self.steps = 0
        self.events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self.values = torch.zeros(self.LAG, pin_memory=True)
            self.events = [torch.cuda.Event() for _ in range(self.LAG)]

    def put(self, value: Tensor) -> None:
        """Take one step's sum over all ranks, a scalar: more than 0 where any was asked."""
        if not self.events:
            self.yes |= bool(value > 0)
            return
        slot = self.steps % self.LAG
        if self.steps >= self.LAG:
            self.events[slot].synchronize()  # a host sync with what the device did LAG steps ago
            self.yes |= bool(self.values[slot] > 0)
        self.values[slot].copy_(value.detach(), non_blocking=True)
        self.events[slot].record()
        self.steps += 1
