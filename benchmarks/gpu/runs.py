"""Trainings by the public command, several at a time, and what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

AT_ONCE = min(8, max(2, (os.cpu_count() or 2) // 2))  # trainings; only if their speed does not matter
LIMIT_S = 90.0  # for one training

K = TypeVar("K")


@dataclass(frozen=True)
class Ended:
    """Exit status, output and duration of a command."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    def reason(self) -> str:
        """Return the last line of the error output."""
        return ([line for line in self.stderr.splitlines() if line.strip()] or ["no output"])[-1][:300]


def command(run: Path, *settings: str) -> list[str]:
    """Return the command of a training in the run directory ``run``."""
    return [sys.executable, "-m", "distlenet.train", f"run.dir={run.parent}", f"run.name={run.name}", *settings]


def execute(words: Sequence[str]) -> Ended:
    """Run a command to its end, or kill it after ``LIMIT_S``."""
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_S)
        return Ended(process.returncode, stdout, stderr, time.monotonic() - started)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
        return Ended(-9, stdout, f"{stderr}\nkilled after {LIMIT_S:.0f} s", time.monotonic() - started)


def execute_all(commands: Mapping[K, Sequence[str]]) -> Iterator[tuple[K, Ended]]:
    """Run commands, ``AT_ONCE`` at a time; yield each key with how its command ended, in the order of the commands."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from zip(commands, pool.map(execute, commands.values()), strict=True)


def summary(run: Path) -> dict[str, Any]:
    """Return the summary of a complete run."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


def graph_warning(stderr: str) -> str:
    """Return the line that reports that a run has no CUDA graph, or an empty string."""
    return next((line for line in stderr.splitlines() if "train.cuda_graph" in line), "")


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of model and optimizer in the newest checkpoint, by name."""
    path = max((run / "checkpoints").glob("step-*.pt"))
    state = torch.load(path, weights_only=True, map_location="cpu")
    tensors = dict(state["model"])
    for number, values in state["optimizer"]["state"].items():
        tensors |= {f"optimizer {number} {key}": value for key, value in values.items() if torch.is_tensor(value)}
    return tensors


def difference(first: Path, second: Path) -> str:
    """Return how the final weights and optimizer states of two runs differ; an empty string if to no bit."""
    one, other = final_state(first), final_state(second)
    if one.keys() != other.keys():
        return f"other tensors: {', '.join(sorted(one.keys() ^ other.keys()))}"
    different = [name for name in one if not torch.equal(one[name], other[name])]
    if not different:
        return ""
    largest = max(float((one[name].double() - other[name].double()).abs().max()) for name in different)
    return f"{len(different)} of {len(one)} tensors differ, by at most {largest:.1e}"
