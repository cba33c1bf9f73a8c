"""Start the processes of a proof and wait for them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distlenet.utils.errors import UserError

LIMIT_S = 3600.0
"""For one run. The watchdog of a run ends it much earlier if it hangs."""

GRACE_S = 15.0
"""From the failure of a rank until the others are killed."""


class ProcessFailed(Exception):
    """A process has ended with an error; the text is the end of its output."""


@dataclass(frozen=True)
class Job:
    """The ranks of a run, or one process without ranks."""

    directory: Path
    processes: list[subprocess.Popen[bytes]]

    def wait(self, killed: bool = False) -> None:
        """Wait until all ranks have ended; with ``killed``, by SIGKILL.

        Raise UserError if a rank reports one, ProcessFailed if one ends in another unexpected way.
        """
        deadline = time.monotonic() + LIMIT_S
        expected = -signal.SIGKILL if killed else 0
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            if any(process.returncode not in (None, expected) for process in self.processes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        self.kill()
        statuses = [process.returncode for process in self.processes]
        if all(status == expected for status in statuses):
            return
        outputs = [path.read_text(errors="replace") for path in sorted(self.directory.glob("output-*.txt"))]
        lines = [line.removeprefix("distlenet: ") for text in outputs for line in text.splitlines()[-1:]]
        if 2 in statuses:
            raise UserError(lines[statuses.index(2)] if len(lines) == len(statuses) else lines[0])
        shown = next((text for text, status in zip(outputs, statuses, strict=True) if status not in (expected, -9)), "")
        raise ProcessFailed(f"exit status {statuses}: " + "\n".join(shown.splitlines()[-12:]))

    def kill(self) -> None:
        """Kill all processes that still run."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[0].pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@contextmanager
def start(directory: Path, words: Sequence[str], ranks: int = 1, hash_seed: int = 0) -> Iterator[Job]:
    """Start ``ranks`` processes of ``distlenet.prove.child`` in one process group; kill them at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ("SLURM_", "TORCHELASTIC_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    common = {"OMP_NUM_THREADS": "1", **inherited, "WANDB_MODE": "disabled", "PYTHONHASHSEED": str(hash_seed)}
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", "distlenet.prove.child", f"--out={directory}", *words]
    try:
        for rank in range(ranks):
            own = {name: str(value) for name, value in {**sizes, "RANK": rank, "LOCAL_RANK": rank}.items()}
            with (directory / f"output-{rank:04}.txt").open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env={**common, **own},
                    process_group=processes[0].pid if processes else 0,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        yield Job(directory, processes)
    finally:
        if processes:
            Job(directory, processes).kill()
