"""The time before the first step: a stop request ends the process at once, and a terminal shows that it starts.

This module imports only the standard library: entry points use it before they import torch, which takes seconds.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # not SIGUSR1, which NCCL may use
PREEMPTED = 75  # exit status of a run that stopped on request and can be resumed: EX_TEMPFAIL of BSD's sysexits.h

STOPPING = threading.Lock()  # held by the thread that ends the process


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the first of its job, as far as its launcher has set it."""
    hydra = ("PMI_RANK",) * ("MPI_LOCALRANKID" in environ)  # srun may set PMI_RANK, too
    names = ("RANK", "OMPI_COMM_WORLD_RANK", *hydra, "SLURM_PROCID")
    return next((environ[name] for name in names if name in environ), "0") == "0"


def announce_start() -> None:
    """Print a line if a person is waiting at a terminal."""
    if is_first_rank() and sys.stdout is not None and sys.stdout.isatty():
        print("distlenet is starting: it loads PyTorch, connects the ranks and reads the data", flush=True)


def exit_on_stop_request() -> None:
    """Exit at SIGTERM or SIGUSR2, with one line and status 75, until other handlers are installed.

    Python calls handlers between two operations of the main thread, which may wait for other ranks for minutes.
    Therefore a second thread waits for signals, and ends the process, too.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore)  # a signal to a child is not one to this process
    threading.Thread(target=_wait, args=(reading,), name="startup", daemon=True).start()


def stop(number: int, _: FrameType | None) -> None:
    """Handle a signal before the first step: nothing has to be saved."""
    if STOPPING.acquire(blocking=False):
        if is_first_rank():
            name = signal.Signals(number).name
            line = f"distlenet: stopped by {name} before the first step; the same command starts again\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # the signal may have interrupted a write to sys.stderr
        os._exit(PREEMPTED)


def _restore() -> None:
    """Return to the default actions, in a forked child."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is stop:
            signal.signal(number, signal.SIG_DFL)


def _wait(reading: int) -> None:
    """End the process at a signal. Python's signal handler writes its number to the pipe ``reading``, in any thread."""
    while numbers := os.read(reading, 1):
        if numbers[0] in STOP_SIGNALS and signal.getsignal(numbers[0]) is stop:
            stop(numbers[0], None)
