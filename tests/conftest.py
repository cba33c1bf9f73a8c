"""Shared helpers: data, a process group of one, and commands with a hard time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from distlenet.data.download import DEBIAN_DIRECTORY, locate
from distlenet.data.idx import find_files
from distlenet.utils.process import environment_outside_job

os.environ["WANDB_MODE"] = "disabled"  # except in the tests of W&B

ALL_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
GPUS = os.environ.setdefault("DISTLENET_TEST_GPUS", ALL_GPUS)  # pytest-xdist starts its workers from this process
"""The GPUs of the tests in test_cuda.py, as in CUDA_VISIBLE_DEVICES."""
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all other tests use the CPU, and test the same thing on every machine

# The same examples each time; by default, one that takes longer than 0.2 s is a failure.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

LIMIT_S = 240.0  # for a command or one wait on it: it only ends a hang; a busy machine may need minutes
REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    command: str
    status: int
    stdout: str
    stderr: str

    def succeeded(self) -> "CommandResult":
        """Fail the test and show all output unless the status is 0."""
        assert self.status == 0, str(self)
        return self

    def __str__(self) -> str:
        return f"{self.command}\nstatus {self.status}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def run_command(
    *words: object, timeout: float = LIMIT_S, env: dict[str, str] | None = None, cwd: Path = REPO
) -> CommandResult:
    """Run a command. At the time limit, kill it and its descendants, and fail with its output and Python stacks."""
    command = [str(word) for word in words]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=clean_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        pids = process_tree(process.pid)
        signal_all(pids[1:], signal.SIGABRT)  # Python's fault handler prints the stacks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        signal_all(pids, signal.SIGKILL)
        stdout, stderr = process.communicate()
        result = CommandResult(" ".join(command), process.returncode, stdout, stderr)
        pytest.fail(f"still running, or its output still open, after {timeout} s: {result}")
    return CommandResult(" ".join(command), process.returncode, stdout, stderr)


def clean_environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: without launcher variables, one thread, fault handler on."""
    return {**environment_outside_job(), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(extra or {})}


def process_tree(pid: int) -> list[int]:
    """Return the process and its descendants in all sessions; torchrun starts a session for each rank.

    A descendant whose parent has exited is found by its session.
    """
    parents_and_sessions = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # has exited
            _, parent, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            parents_and_sessions[int(stat.parent.name)] = int(parent), int(session)
    pids = [pid]
    for ancestor in pids:
        pids += [other for other, origin in parents_and_sessions.items() if ancestor in origin and other not in pids]
    return pids


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def read_lines(path: Path) -> list[dict]:
    """Return the records of a .jsonl file, but the last one if it is just being written."""
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


class Job:
    """A command in the background; its ``with`` block ends by killing it and its descendants."""

    def __init__(self, directory: Path, *words: object, env: dict[str, str] | None = None) -> None:
        self.command, self.output_file = [str(word) for word in words], directory / f"out-{time.monotonic_ns()}.txt"
        self.run = directory / "run"
        with self.output_file.open("w") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdout=out,
                stderr=out,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the command and its descendants."""
        signal_all(process_tree(self.process.pid), signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """Return everything printed so far."""
        return self.output_file.read_text()

    def wait(self, timeout: float = LIMIT_S) -> CommandResult:
        """Wait until the command exits."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            signal_all(process_tree(self.process.pid)[1:], signal.SIGABRT)
            time.sleep(1)  # the fault handler prints the stacks
            pytest.fail(f"still running after {timeout} s: {self.output()}")
        return CommandResult(" ".join(self.command), status, self.output(), "")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition`` is true; fail if the command exits first."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            has_exited = self.process.poll() is not None  # read first: the command may meet the condition and exit
            if condition():
                return
            assert not has_exited, f"exited before {what}: {self.output()}"
            assert time.monotonic() < deadline, f"timed out waiting for {what}: {self.output()}"
            time.sleep(0.02)

    def wait_for_records(self, count: int = 1) -> None:
        """Wait for ``count`` new records of the training run."""
        target = len(self._records()) + count
        self.wait_until(lambda: len(self._records()) >= target, "a record")

    def wait_for_step(self, step: int) -> None:
        """Wait for a record of the training run after ``step`` steps or more."""
        self.wait_until(lambda: any(record["step"] >= step for record in self._records()), f"step {step}")

    def _records(self) -> list[dict]:
        return read_lines(self.run / "metrics.jsonl")

    def rank_pids(self) -> list[int]:
        """Return the pids of torchrun's ranks, in rank order."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def run_torchrun(
    ranks: int, *words: object, timeout: float = LIMIT_S, env: dict[str, str] | None = None
) -> CommandResult:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` under torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return run_command(sys.executable, *launcher, *words, timeout=timeout, env=env)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def fashion_mnist() -> dict[str, Path]:
    """The four files of Fashion-MNIST; ``make test`` downloads them."""
    files = locate("fashion_mnist", REPO / "data") or find_files(DEBIAN_DIRECTORY["fashion_mnist"])
    assert files is not None, "Fashion-MNIST is missing: run `make data`"
    return files


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], str]:
    """Run a main function that must exit with status 2 and one line on standard error; return the line."""
    from distlenet.distributed.entry_point import run_entry

    def check(main: Callable[[], None]) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_entry(main)
        error = capsys.readouterr().err
        assert exit_info.value.code == 2, error
        lines = error.splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith("distlenet: ")
        return lines[0]

    return check


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Several tests run at once on two cores."""
    torch.set_num_threads(1)


@pytest.fixture
def python_handles_ctrl_c():
    """Workers of pytest-xdist ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
