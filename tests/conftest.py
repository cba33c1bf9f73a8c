"""Helpers that all tests share: real data, a group of one, and running commands under a hard time limit."""

import contextlib
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

from distlenet.data.download import locate

os.environ["WANDB_MODE"] = "disabled"  # but in the tests that are about it

LIMIT_S = 90.0  # of one wait for a command under way; several times what it needs on two cores
REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a command ended, with everything that it and its ranks printed."""

    command: str
    status: int
    stdout: str
    stderr: str

    def succeeded(self) -> "Ended":
        """Fail the test, showing all output, unless the status is 0."""
        assert self.status == 0, str(self)
        return self

    def __str__(self) -> str:
        return f"{self.command}\nstatus {self.status}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


def run_command(*words: object, timeout: float = 120, env: dict[str, str] | None = None, cwd: Path = REPO) -> Ended:
    """Run a command; at the time limit, kill it and all that it started, and fail with its output.

    They are told to abort first, which makes Python's fault handler print where each of them is.
    """
    command = [str(word) for word in words]
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**plain, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        doomed = tree(process.pid)
        signal_all(doomed[1:], signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        signal_all(doomed, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"still running after {timeout} s: " + str(Ended(" ".join(command), -9, stdout, stderr)))
    return Ended(" ".join(command), process.returncode, stdout, stderr)


def tree(pid: int) -> list[int]:
    """List a process and its descendants, whatever sessions they are in (torchrun gives each rank its own)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone in the meantime
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Running:
    """A command under way; ended, with all that it started, at the end of its ``with`` block."""

    def __init__(self, folder: Path, *words: object, env: dict[str, str] | None = None) -> None:
        self.command, self.out = [str(word) for word in words], folder / f"out-{time.monotonic_ns()}.txt"
        self.run = folder / "run"
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPO,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdout=out,
                stderr=out,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, with all that it has started."""
        signal_all(tree(self.process.pid), signal.SIGKILL)
        self.process.wait()

    def printed(self) -> str:
        return self.out.read_text()

    def ends(self, timeout: float = LIMIT_S) -> Ended:
        """Wait for the end."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            signal_all(tree(self.process.pid)[1:], signal.SIGABRT)
            time.sleep(1)  # for the fault handler to print
            pytest.fail(f"still running after {timeout} s: {self.printed()}")
        return Ended(" ".join(self.command), status, self.printed(), "")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until ``condition`` holds, while the command runs."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.printed()}"
            assert time.monotonic() < deadline, f"waited for {what}: {self.printed()}"
            time.sleep(0.02)

    def trains(self, more: int = 1) -> None:
        """Wait until ``more`` records were told from now on."""
        path = self.run / "metrics.jsonl"
        count = lambda: path.read_text().count("\n") if path.exists() else 0  # noqa: E731
        wanted = count() + more
        self.until(lambda: count() >= wanted, "a record")

    def ranks(self) -> list[int]:
        """Return the ranks' processes, in the order of their start."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def run_torchrun(ranks: int, *words: object, timeout: float = 120, env: dict[str, str] | None = None) -> Ended:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` on several ranks of this machine."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    return run_command(sys.executable, *launcher, *words, timeout=timeout, env=env)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def fashion_mnist() -> dict[str, Path]:
    """The four files of the real Fashion-MNIST, which ``make test`` puts in place."""
    files = locate("fashion_mnist", REPO / "data")
    assert files is not None, "Fashion-MNIST is not here: run `make data`, as `make test` does"
    return files


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], None]], str]:
    """Run an entry's main that must end with status 2 and one line on standard error; return the line."""
    from distlenet.distributed.entry_point import run_entry

    def check(main: Callable[[], None]) -> str:
        with pytest.raises(SystemExit) as ended:
            run_entry(main)
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        lines = error.splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith("distlenet: ")
        return lines[0]

    return check


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two cores may run several ranks at once."""
    torch.set_num_threads(1)
