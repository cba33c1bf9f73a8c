"""Run modules and scripts in processes forked from a server that has imported torch and distlenet.

Such a process is as fresh as a new interpreter, which needs about 3 s to import the same modules. Use ``run_python``
and ``run_ranks`` unless a test is about the interpreter, torchrun, or imports.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import pytest
from conftest import LIMIT_S, REPO, CommandResult, clean_environment, process_tree, signal_all

from distlenet.prove.processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "pytest", "distlenet.train", "distlenet.evaluate", "distlenet.ledger"])
ABORT_S = 15.0  # from the first failure of a rank until the others are killed


def run_python(
    *words: object, timeout: float = LIMIT_S, env: dict[str, str] | None = None, cwd: Path = REPO
) -> CommandResult:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` in one process."""
    return _run(words, [clean_environment(env)], timeout, cwd)


def run_ranks(
    ranks: int, *words: object, timeout: float = LIMIT_S, env: dict[str, str] | None = None, cwd: Path = REPO
) -> CommandResult:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` on several ranks, without a launcher.

    The status is that of the first rank that failed; the other ranks are then terminated, as torchrun does.
    """
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = clean_environment({**sizes, **address, **(env or {})})
    return _run(words, [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)], timeout, cwd)


def _run(words: Sequence[object], environments: list[dict[str, str]], timeout: float, cwd: Path) -> CommandResult:
    command = [str(word) for word in words]
    with tempfile.TemporaryDirectory(prefix="forked-") as directory:
        outputs = [Path(directory) / name for name in ("stdout", "stderr")]
        processes = [CONTEXT.Process(target=_main, args=(command, env, cwd, outputs)) for env in environments]
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # for the server, which the first start launches
            for process in processes:
                process.start()
        deadline, status, timed_out = time.monotonic() + timeout, 0, False
        while running := [process for process in processes if process.exitcode is None]:
            wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed and not status:
                status, deadline = failed[0], min(deadline, time.monotonic() + ABORT_S)
                signal_all([process.pid for process in running], signal.SIGTERM)
            if time.monotonic() >= deadline:
                timed_out = not status
                pids = [pid for process in running for pid in process_tree(process.pid)]
                if timed_out:
                    signal_all(pids, signal.SIGABRT)  # Python's fault handler prints the stacks
                    time.sleep(1)
                signal_all(pids, signal.SIGKILL)
                for process in running:
                    process.join()
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
        result = CommandResult(" ".join(command), status, stdout, stderr)
    if timed_out:
        pytest.fail(f"still running after {timeout} s: {result}")
    return result


def _main(command: list[str], env: dict[str, str], cwd: Path, outputs: list[Path]) -> None:
    """Become the command: a session, environment, directory and standard streams as a new interpreter would have."""
    multiprocessing.set_start_method(None, force=True)  # the default, as in a new interpreter
    os.setsid()
    for descriptor, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):  # the ranks share the files: each line is one write
        stream.reconfigure(line_buffering=True, write_through=False)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # read TMPDIR again
    os.chdir(cwd)
    faulthandler.enable()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
