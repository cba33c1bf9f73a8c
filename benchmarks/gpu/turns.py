"""Measure training programs in turns: each waits, with all its memory ready, while another one takes steps.

Machines have slow and fast minutes; turns of a fraction of a second in rotating order make the speeds comparable.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 60.0  # for one turn, the first with its start included
MANY = 10**9
SLOW_S = 0.05  # a step that takes longer is not dominated by what a warm-up makes faster


class TurnClock:
    """The program's side: for each line "SKIP STEPS" on stdin take SKIP steps, then STEPS timed ones; print JSON.

    At the end of stdin the process exits. It has the interface of ``peers.Clock``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, MANY
        self.skip = self.left = 0
        self.started = self.paused_s = 0.0
        self.results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # the results alone go to stdout

    def tick(self) -> bool:
        """Count one step; between turns, wait for the next line. Return False: there is no last step."""
        if self.skip:
            self.skip -= 1
            if self.skip == 0:
                self._start()
        elif self.left:
            self.left -= 1
            if self.left == 0:
                self._end()
        if not self.skip and not self.left:
            self._wait()
        return False

    def report(self) -> None:
        """Do nothing: the results are printed after each turn."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude what happens in a ``with`` block."""
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        self.paused_s += time.perf_counter() - begin

    def _wait(self) -> None:
        if not (line := sys.stdin.readline()):
            os._exit(0)
        self.skip, self.left = map(int, line.split())

    def _start(self) -> None:
        self._synchronize()
        self.paused_s, self.started = 0.0, time.perf_counter()

    def _end(self) -> None:
        queued = time.perf_counter()
        self._synchronize()
        excluded = self.started + self.paused_s
        record = {"s": time.perf_counter() - excluded, "host_s": queued - excluded}
        if self.device.type == "cuda":
            record["peak_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
            record["reserved_mib"] = torch.cuda.memory_reserved(self.device) / 2**20
        print(json.dumps(record), file=self.results, flush=True)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Failed(Exception):
    """A contestant that has ended or hangs. The text is the reason."""


class Contestant:
    """The other side: a program that waits for its turns."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("contestant.py")), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def turn(self, skip: int, steps: int) -> dict[str, float]:
        """Return seconds of ``steps`` steps after ``skip`` others, and memory. Raise Failed."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(skip, steps, file=stdin, flush=True)
        except BrokenPipeError as error:
            raise Failed(self._reason()) from error
        if not select.select([stdout], [], [], LIMIT_S)[0]:
            raise Failed(f"no answer within {LIMIT_S:.0f} s")
        if not (line := stdout.readline()):
            raise Failed(self._reason())
        record: dict[str, float] = json.loads(line)
        return {**record, "steps": steps}

    def close(self) -> None:
        """End the program."""
        self.process.kill()
        self.process.communicate()

    def _reason(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "ended without output"


@dataclass(frozen=True)
class Measured:
    """The turns of a contestant, or why there are none."""

    turns: Sequence[dict[str, float]]
    failure: str = ""
    log: str = ""

    def step_s(self) -> list[float]:
        """Return the seconds per step of each turn."""
        return [turn["s"] / turn["steps"] for turn in self.turns]

    def median(self, key: str, default: float = float("nan")) -> float:
        """Return the median of a value of the turns."""
        return statistics.median(turn.get(key, default) for turn in self.turns)


def warm_up(contestant: Contestant, turn_s: float) -> tuple[int, int]:
    """Let a contestant capture and choose its algorithms; return how many steps a turn skips and takes."""
    step_s = _step_s(contestant.turn(2, 2))
    if step_s < SLOW_S:
        contestant.turn(20, max(2, min(40, int(turn_s / step_s))))
        steps = max(2, min(200, int(turn_s / step_s)))
        step_s = _step_s(contestant.turn(2, steps))
    steps = max(2, int(turn_s / step_s))
    return max(1, steps // 5), steps


def measure(contestants: Mapping[str, Sequence[str]], logs: Path, rounds: int, turn_s: float) -> dict[str, Measured]:
    """Start all contestants at once, then measure them in turns, in each round in another order."""
    running: dict[str, Contestant] = {}
    plans: dict[str, tuple[int, int]] = {}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    failures: dict[str, str] = {}

    def attempt(name: str, action: Any) -> Any:
        try:
            return action()
        except Failed as failed:
            failures[name] = str(failed)
            return None

    try:
        for number, (name, words) in enumerate(contestants.items()):
            running[name] = Contestant(words, logs / f"{number}.log")
        for name, contestant in running.items():
            plans[name] = attempt(name, lambda c=contestant: warm_up(c, turn_s))
        names = list(contestants)
        for number in range(rounds):
            start = number * 3 % len(names)
            for name in names[start:] + names[:start]:
                if name not in failures and (turn := attempt(name, lambda n=name: running[n].turn(*plans[n]))):
                    turns[name].append(turn)
        return {name: Measured(turns[name], failures.get(name, ""), running[name].log.read_text()) for name in names}
    finally:
        for contestant in running.values():
            contestant.close()


def _step_s(turn: dict[str, float]) -> float:
    return max(1e-7, turn["s"] / turn["steps"])
