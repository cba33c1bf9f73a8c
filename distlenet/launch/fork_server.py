"""The fork server: a process that imports what ranks import, and forks a rank at each request of torchrun's agent.

It has one thread, no signal handlers, no GPU context, and no open files but the standard streams and its connection
to the agent. A rank is therefore the same as in a new interpreter, without the seconds of imports.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distlenet.utils.process import exit_with_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PRELOAD = ("torch._dynamo", "distlenet.train")  # torch.optim imports torch._dynamo on first use: 1 s
Request = tuple[tuple[str, ...], dict[str, str], tuple[str | None, str | None], set[int]]
"""Arguments of Python, environment, files for stdout and stderr (None: those of the agent), and CPUs (empty: all)."""


def main() -> None:
    """Import, serve requests, and become a rank in each fork."""
    exit_with_parent()
    exits = Exit()
    atexit.register(exits.end_process)  # before the functions that the imports register, so it is called after them
    from multiprocessing.connection import Connection

    connection = Connection(int(sys.argv[1]))
    for name in PRELOAD:
        importlib.import_module(name)
    if reason := unsafe_to_fork({0, 1, 2, connection.fileno()}):
        sys.exit(f"distlenet: no warm start of ranks: after the imports, {reason}")
    gc.freeze()  # a collection in a rank must not copy the pages of all objects
    request = wait_for_request(connection)
    with exits.record_status():
        run_rank(*request)


class Exit:
    """The end of a rank: exit handlers are called, but the interpreter does not free its objects one by one.

    That would copy the pages they share with the fork server, which takes longer than all other parts of a restart.
    """

    def __init__(self) -> None:
        self.status: int | None = None  # None in the fork server

    @contextmanager
    def record_status(self) -> Iterator[None]:
        """Record the exit status of the block, which is the rest of the process."""
        self.status = 1
        try:
            yield
            self.status = 0
        except SystemExit as error:
            if error.code is None or isinstance(error.code, int):
                self.status = (error.code or 0) & 0xFF
            raise

    def end_process(self) -> None:
        """End a rank; the last exit handler."""
        if self.status is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # None, or closed
                    stream.flush()
            ctypes.CDLL(None).fflush(None)
            os._exit(self.status)


def unsafe_to_fork(allowed: set[int]) -> str:
    """Return why this process must not fork ranks; empty if it may. An initialized GPU driver has open files.

    A fork before the check: the libraries that are prepared for forks (OpenBLAS) stop their threads in it.
    """
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 1.0  # the kernel removes a thread slightly after it was joined
    while (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        if time.monotonic() > deadline:
            return f"there are {threads} threads"
    opened = {}
    for path in Path("/proc/self/fd").iterdir():
        if int(path.name) not in allowed and path.exists():  # not the directory that is being read
            opened[int(path.name)] = os.readlink(path)
    return f"files are open: {', '.join(opened.values())}" if opened else ""


def wait_for_request(connection: "Connection") -> Request:
    """Fork at each request of the agent, and return the request in the fork. Exit when the agent has exited."""
    agent = os.getppid()
    while True:
        try:
            request: Request = connection.recv()
            is_rank = fork_child_of(agent, connection)
        except (EOFError, ConnectionError):
            sys.exit(0)
        if is_rank:
            connection.close()
            return request


def fork_child_of(agent: int, connection: "Connection") -> bool:
    """Fork a child process of the agent, a subreaper, and send its pid to the agent. Return True in that process.

    An intermediate process forks the rank and exits, and the kernel makes the agent the parent. For rank and agent,
    everything is as if the agent had started the rank.
    """
    pid_reading, pid_writing = os.pipe()
    go_reading, go_writing = os.pipe()
    intermediate = os.fork()
    if intermediate == 0:
        try:
            if os.fork():
                os._exit(0)
            os.setsid()  # as torchrun does: it signals the session
            os.write(pid_writing, str(os.getpid()).encode())
            os.close(go_writing)
            go = os.read(go_reading, 1)
            exit_with_parent()
            if go != b"g" or os.getppid() != agent:
                os._exit(1)
            for descriptor in (pid_reading, pid_writing, go_reading):
                os.close(descriptor)
        except OSError:
            os._exit(1)
        return True
    for descriptor in (pid_writing, go_reading):
        os.close(descriptor)
    pid = os.read(pid_reading, 20)
    os.waitpid(intermediate, 0)
    if not pid:
        sys.exit("distlenet: the fork of a rank failed")
    connection.send(int(pid))
    os.write(go_writing, b"g")  # after the agent knows the rank: it starts another if this process dies before
    for descriptor in (pid_reading, go_writing):
        os.close(descriptor)
    return False


def run_rank(
    arguments: tuple[str, ...], environ: dict[str, str], outputs: tuple[str | None, str | None], cpus: set[int]
) -> None:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` in this process as in a new interpreter."""
    for descriptor, path in enumerate(outputs, start=1):
        if path is not None:
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
    if cpus:
        os.sched_setaffinity(0, cpus)
    os.environ.clear()
    os.environ.update(environ)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all ranks have the state of this process
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.modules.pop(arguments[1], None)  # it runs again, as __main__
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        if not sys.flags.safe_path:
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
