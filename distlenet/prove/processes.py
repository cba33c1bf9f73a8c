"""Start the processes of a proof and wait for them.

All but one are forked from a server that has imported torch and this package, which takes seconds. They are as fresh as
new interpreters: the server has imported nothing of the user, and drawn no random number.
"""

import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from distlenet.utils.agent_report import ERROR_FILE, read_failure
from distlenet.utils.errors import UserError
from distlenet.utils.process import environment_outside_job

LIMIT_S = 3600.0
"""For one run. The watchdog of a run ends it much earlier if it hangs."""

GRACE_S = 15.0
"""From the failure of a rank until the others are killed."""

SERVER_HASH_SEED = 0
SERVER, INTERPRETER = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")


class ProcessFailed(Exception):
    """A process has ended with an error; the text is the end of its output."""


@dataclass(frozen=True)
class Job:
    """The ranks of a run, or one process without ranks."""

    directory: Path
    processes: list[BaseProcess]

    def wait(self, killed: bool = False) -> None:
        """Wait until all ranks have ended; with ``killed``, by SIGKILL.

        Raise UserError if a rank reports one, ProcessFailed if one ends in another unexpected way, or runs longer than
        ``LIMIT_S``.
        """
        deadline = time.monotonic() + LIMIT_S
        expected = -signal.SIGKILL if killed else 0
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(process.exitcode not in (None, expected) for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        running = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        has_failed = any(process.exitcode not in (None, expected) for process in self.processes)
        self.kill()
        if running and not has_failed:
            raise ProcessFailed(f"ranks {running} have not ended after {LIMIT_S:g} s, the time limit of a run")
        statuses = [process.exitcode for process in self.processes]
        if all(status == expected for status in statuses):
            return
        failures = [read_failure(_failure_file(self.directory, rank)) for rank in range(len(statuses))]
        if 2 in statuses and (text := next(filter(None, failures), None)):  # one rank reports it
            raise UserError(text.removeprefix("distlenet: "))
        outputs = [output_of(self.directory, rank) for rank in range(len(statuses))]
        texts = [path.read_text(errors="replace") if path.exists() else "" for path in outputs]
        shown = next((text for text, status in zip(texts, statuses, strict=True) if status not in (expected, -9)), "")
        raise ProcessFailed(f"exit status {statuses}: " + "\n".join(shown.splitlines()[-12:]))

    def kill(self) -> None:
        """Kill all processes that still run, with their loader workers."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.kill()
            process.join()


def output_of(directory: Path, rank: int) -> Path:
    """Return the file that receives what a rank prints."""
    return directory / f"output-{rank:04}.txt"


def _failure_file(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:04}" / "error.json"


@contextmanager
def start(directory: Path, words: Sequence[str], ranks: int = 1, hash_seed: int = SERVER_HASH_SEED) -> Iterator[Job]:
    """Start ``ranks`` processes of ``distlenet.prove.child``; kill them at the end of the block."""
    directory.mkdir(parents=True, exist_ok=True)
    fixed = {"WANDB_MODE": "disabled", "PYTHONHASHSEED": str(hash_seed)}
    common = {"OMP_NUM_THREADS": "1", **environment_outside_job(), **fixed}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, **address}
    SERVER.set_forkserver_preload(["torch._dynamo", "distlenet.prove.child"])
    context = SERVER if hash_seed == SERVER_HASH_SEED else INTERPRETER
    job = Job(directory, [])
    try:
        with _environment(common):  # the server and the interpreter inherit it
            for rank in range(ranks):
                failure_file = _failure_file(directory, rank)
                failure_file.parent.mkdir(exist_ok=True)
                failure_file.unlink(missing_ok=True)  # of an earlier start
                values = {**sizes, "RANK": rank, "LOCAL_RANK": rank, ERROR_FILE: failure_file}
                own = {name: str(value) for name, value in values.items()}
                arguments = ([f"--out={directory}", *words], {**common, **own}, output_of(directory, rank))
                process = context.Process(target=_become_child, args=arguments)
                process.start()
                job.processes.append(process)
        yield job
    finally:
        job.kill()


def free_port() -> int:
    """Return a free port below those that the system gives to other programs while the ranks start."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set the environment of this process until the end of the block."""
    before = dict(os.environ)
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)


def _become_child(words: list[str], environment: Mapping[str, str], output: Path) -> None:
    """Run ``distlenet.prove.child`` in this process, with a session, an environment and generators as a new one has."""
    import numpy as np  # not in the parent process: it takes a while

    os.setsid()
    with output.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    _set_environment(environment)
    multiprocessing.set_start_method(None, force=True)  # the default, for loader workers
    random.seed()
    np.random.seed()
    sys.argv = ["distlenet.prove.child", *words]
    runpy.run_module("distlenet.prove.child", run_name="__main__", alter_sys=True)
