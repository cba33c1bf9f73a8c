"""Stop requests: SIGTERM, SIGUSR2 or Ctrl-C sets a flag, and all ranks stop after the same step.

A scheduler signals a job before it ends it, but not every rank receives the signal, or not during the same step. The
flag of each rank is therefore part of what the ranks reduce in every step anyway (see ``distlenet.reduction``).
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from distlenet.utils.process import exit_with_parent
from distlenet.utils.startup import (
    INTERRUPTED,
    PREEMPTED,
    STOP_SIGNALS,
    RepeatedCtrlC,
    is_ignored,
    print_line,
    signal_name,
    stop,
)

SIGNALS = STOP_SIGNALS


@dataclass
class Preemption:
    """The stop request of this rank, which must exit ``grace_s`` seconds after it. It needs ``install``."""

    grace_s: float
    requested_by: str | None = None  # the name of the signal, or another cause
    status: int = PREEMPTED  # exit status after the stop
    deadline: float = math.inf
    previous_handlers: dict[int, Any] = field(default_factory=dict, repr=False)  # signal.signal formats handlers
    is_repeated: RepeatedCtrlC = field(default_factory=RepeatedCtrlC, repr=False)

    def install(self) -> None:
        """Handle the signals from now on."""
        numbers = [number for number in SIGNALS if not is_ignored(number)]
        self.previous_handlers = {number: signal.signal(number, self.handle_signal) for number in numbers}

    def handle_signal(self, number: int, _: FrameType | None = None) -> None:
        """Record the first signal; later ones do not extend the deadline. Raise KeyboardInterrupt at Ctrl-C again."""
        if self.is_repeated(number):
            raise KeyboardInterrupt
        if self.requested_by is None:
            self.request(signal_name(number), INTERRUPTED if number == signal.SIGINT else PREEMPTED)
            if number == signal.SIGINT:
                print_line("Ctrl-C: saving after this step; Ctrl-C again ends without a save")

    def request(self, by: str, status: int = PREEMPTED) -> None:
        """Request a stop, as a signal does, after which the command exits with ``status``. Any thread may call it."""
        if self.requested_by is None:
            self.status = status
            self.deadline = time.monotonic() + self.grace_s
            self.requested_by = by

    @property
    def stop_requested(self) -> bool:
        """Whether this rank has a stop request."""
        return self.requested_by is not None

    def seconds_left(self) -> float:
        """Return the seconds until this rank must exit; ``grace_s`` if there is no stop request."""
        return max(0.0, min(self.deadline - time.monotonic(), self.grace_s))

    def close(self) -> None:
        """Restore the previous handlers, but not ``stop``, which reports that no step was taken."""
        for number, handler in self.previous_handlers.items():
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default if handler is stop else handler)


@contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals, also for a worker forked in the block until ``worker_init_fn``: SIGTERM would end it."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def worker_init_fn(_: int = 0) -> None:
    """Make a loader's worker ignore the signals, except SIGTERM from its rank, which needs it until the last step.

    Python sends that SIGTERM, and waits for the worker to exit, if the rank exits before its loader is closed.
    """
    ignored = {signal.SIGUSR2, signal.SIGINT}
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_from_parent, daemon=True).start()
    exit_with_parent()


def _exit_on_sigterm_from_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
