"""Signals that end a process at once: a stop request before the first step, and a second Ctrl-C.

This module imports only the standard library: entry points use it before they import torch, which takes seconds.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from distlenet.utils.agent_report import rank_has_failed

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # not SIGUSR1, which NCCL may use
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # which torchrun's agent handles, too
PREEMPTED = 75  # exit status of a run that stopped on request and can be resumed: EX_TEMPFAIL of BSD's sysexits.h
INTERRUPTED = 130  # after Ctrl-C: as shells report it, and no script that requeues takes it for a preemption

REPEAT_S = 1.0  # wrappers forward the SIGINT that the terminal has sent, too: until then, both are one Ctrl-C

Handler = Callable[[int, FrameType | None], None]

STOPPING = threading.Lock()  # held by the thread that ends the process


def is_first_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is the first of its job, as far as its launcher has set it."""
    hydra = ("PMI_RANK",) * ("MPI_LOCALRANKID" in environ)  # srun may set PMI_RANK, too
    pod = ("JOB_COMPLETION_INDEX",) * bool(environ.get("WORLD_SIZE"))  # else the pod is not a rank
    names = ("RANK", "OMPI_COMM_WORLD_RANK", *hydra, "SLURM_PROCID", *pod)
    return next((environ[name] for name in names if name in environ), "0") == "0"


def announce_start() -> None:
    """Print a line if a person is waiting at a terminal."""
    if is_first_rank() and sys.stdout is not None and sys.stdout.isatty():
        print("distlenet is starting: it loads PyTorch, connects the ranks and reads the data", flush=True)


def exit_on_stop_request() -> None:
    """Exit at a stop request, with one line and status 75 (Ctrl-C: 130), until other handlers are installed.

    Afterwards, a second Ctrl-C still ends the process.
    """
    _exit_on(STOP_SIGNALS, stop, RepeatedCtrlC())


def exit_on_ctrl_c() -> None:
    """Exit at Ctrl-C, with one line and status 130, until ``run_entry``, and then at the second one."""
    _exit_on((signal.SIGINT,), interrupt, RepeatedCtrlC())


def exit_on_signals(cleanup: Callable[[], None]) -> None:
    """Exit at a signal, with one line and after ``cleanup``, until other handlers are installed."""

    def end(number: int, _: FrameType | None) -> None:
        _end(f"stopped by {signal_name(number)}", 128 + number, cleanup)

    _exit_on(END_SIGNALS, end, lambda _: False)


def unwind_on(*numbers: signal.Signals) -> None:
    """Raise SystemExit at these signals, so that the command removes its temporary files."""
    for each in numbers:
        if not is_ignored(each):
            signal.signal(each, lambda number, _: sys.exit(128 + number))


def stop(number: int, _: FrameType | None) -> None:
    """Handle a signal before the first step: nothing has to be saved."""
    status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
    line = f"stopped by {signal_name(number)} before the first step; the same command starts again"
    _end("" if rank_has_failed() else line, status)  # torchrun's agent sends the signal when a rank fails


def interrupt(number: int, _: FrameType | None) -> None:
    """Handle Ctrl-C in a command that has nothing to save."""
    _end(f"stopped by {signal_name(number)}", INTERRUPTED)


def signal_name(number: int) -> str:
    """Return the name of a signal, for messages."""
    return "SIGINT (Ctrl-C)" if number == signal.SIGINT else signal.Signals(number).name


class RepeatedCtrlC:
    """Recognizes that a person has pressed Ctrl-C again: at the second time, torchrun sends SIGTERM to its ranks.

    Without torchrun, SIGTERM is a request to save, also after Ctrl-C.
    """

    def __init__(self) -> None:
        self.first = math.inf

    def __call__(self, number: int) -> bool:
        """Return whether the signal that has arrived means that."""
        now = time.monotonic()
        repeats = number == signal.SIGINT or (number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ)
        if repeats and now > self.first + REPEAT_S:
            return True
        if number == signal.SIGINT:
            self.first = min(self.first, now)
        return False


def is_ignored(number: int) -> bool:
    """Return whether this process was started to ignore a signal: a shell's background job ignores SIGINT."""
    return signal.getsignal(number) is signal.SIG_IGN


def print_line(text: str) -> None:
    """Print a line on the first rank, in a signal handler: the signal may have interrupted a write to sys.stderr."""
    if is_first_rank():
        start = "\n" if os.isatty(2) else ""  # the terminal has printed ^C, perhaps after a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{start}distlenet: {text}\n".encode())


def _end(text: str, status: int, cleanup: Callable[[], None] = lambda: None) -> None:
    """End the process at once, with one line or none, unless another thread does that."""
    if STOPPING.acquire(blocking=False):
        if text:
            print_line(text)
        cleanup()
        os._exit(status)


def _exit_on(numbers: Sequence[signal.Signals], handler: Handler, is_repeated: Callable[[int], bool]) -> None:
    """Install a handler, and call it also in a second thread, which ends the process if a later signal ``is_repeated``.

    Python calls handlers between two operations of the main thread, which may wait for other ranks for minutes.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in numbers:
        if not is_ignored(number):
            signal.signal(number, handler)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def restore() -> None:  # in a forked child: a signal to it is not one to this process
        signal.set_wakeup_fd(-1)
        for number in numbers:
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=restore)
    threading.Thread(target=_wait, args=(reading, handler, is_repeated), name="signals", daemon=True).start()


def _wait(reading: int, handler: Handler, is_repeated: Callable[[int], bool]) -> None:
    """End the process at a signal. Python's signal handler writes its number to the pipe ``reading``, in any thread."""
    while numbers := os.read(reading, 1):
        if signal.getsignal(numbers[0]) is handler:
            handler(numbers[0], None)
        elif is_repeated(numbers[0]):
            _end("ended by a second Ctrl-C, without a save", INTERRUPTED)
