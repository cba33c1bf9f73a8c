"""The agent's side of the fork server.

This module imports nothing that takes time: the server starts before the agent imports torch, which takes seconds.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distlenet.utils.errors import warn

MODULE = "distlenet.launch.fork_server"
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
TIMEOUT_S = 120.0  # for the imports of the server and one fork


class ForkServer:
    """The fork server of this process."""

    def __init__(self) -> None:
        """Start it; it imports for seconds, in the background."""
        self.has_warned = False
        self.launch()

    def launch(self) -> None:
        """Start the process. The arguments of this process are only for ``ps``, which shows them for each rank."""
        self.connection, other_end = multiprocessing.Pipe()
        descriptor = other_end.fileno()
        self.has_forked = False
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", MODULE, str(descriptor), *sys.argv[1:]],
            pass_fds=[descriptor],
            start_new_session=True,  # a Ctrl-C is for the agent
        )
        other_end.close()

    def fork(self, request: object) -> "ForkedRank | None":
        """Return a new rank, or None if the server has died or does not respond; the first time, print a line.

        Then start another one for the next ranks, unless it has never forked: the next one would not either.
        """
        failure = "has ended"
        with contextlib.suppress(OSError, EOFError), subreaper():
            self.connection.send(request)
            if not self.connection.poll(TIMEOUT_S):
                failure = f"did not respond in {TIMEOUT_S:g} s"
                self.process.kill()
            rank = ForkedRank(self.connection.recv())
            rank.poll()  # raises OSError if it is not a child process
            self.has_forked = True
            return rank
        if not self.has_warned:
            warn(
                f"no warm start: the fork server {failure}; ranks start in new interpreters; "
                "DISTLENET_WARM_START=0 avoids the wait"
            )
            self.has_warned = True
        self.stop()
        if self.has_forked:
            self.launch()
        return None

    def stop(self) -> None:
        """End the process; its ranks continue."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class ForkedRank:
    """What torchrun's agent uses of ``subprocess.Popen``, for a child process that this process did not start."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None if the process is running."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raise TimeoutExpired after ``timeout`` seconds; None: no limit, as older torch."""
        start = time.monotonic()
        while (status := self.poll()) is None:
            if timeout is not None and time.monotonic() > start + timeout:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.005)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has exited."""
        if self.poll() is None:
            os.kill(self.pid, number)


@contextmanager
def subreaper() -> Iterator[None]:
    """Become the parent of descendants whose parent exits in the block."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
