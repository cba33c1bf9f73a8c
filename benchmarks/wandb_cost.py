"""What W&B costs the training, with a server that answers, and with bad ones: ``python benchmarks/wandb_cost.py``.

In each round the same training runs once without W&B, then once in each other way; the time is that in the training
loop, which the process that talks to W&B shares the processors with. Ratios are taken within a round.

On a shared machine one run is 10 % slower than the next for other reasons, so such ratios tell a server's hang from
its answer, but not 1 %. ``--within`` measures that inside each run: all that talks to W&B is stopped (SIGSTOP), and
let run in one of each two windows of WINDOW steps, drawn by lot. What those windows took beyond their neighbours, W&B
has cost, and what the first window, in which nothing is stopped, took beyond that of a run without W&B. Not in that:
its work before the first step, and half of what it does by the clock (it looks at the machine every 15 s).
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from wandb_server import WandbServer

WINDOW = 25
"""Steps."""

WAYS = ("disabled", "offline", "ok", "slow", "error", "hang", "drop", "unreachable")


def environment(way: str, server: WandbServer) -> dict[str, str]:
    """Set W&B up for a way."""
    if way in ("disabled", "offline"):
        return {"WANDB_MODE": way}
    server.behavior = way
    found = dict(server.environ)
    if way == "unreachable":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found["WANDB_BASE_URL"] = f"http://127.0.0.1:{probe.getsockname()[1]}"
    return found


@dataclass(frozen=True)
class Run:
    """One training, in seconds: its loop, its first window, and what W&B has cost in the others."""

    train_s: float
    first_s: float
    cost_s: float


def train(way: str, ranks: int, settings: list[str], lots: random.Random | None) -> Run:
    """Train once. Exits where the run failed or its history has gaps."""
    server = WandbServer()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as runs, open(f"{runs}/output", "w+") as output:
        words = [
            "-m",
            "distlenet.train",
            f"run.dir={runs}",
            "run.name=run",
            "wandb.finish_timeout_s=2",
            f"train.log_every={WINDOW}",
        ]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment(way, server)}
        with Popen([*launcher, *words, *settings], env=environ, stdout=output, stderr=output) as training:
            ran = stop_by_lot(training, Path(runs) / "run/metrics.jsonl", lots) if lots else []
        server.close()
        if training.returncode:
            output.seek(0)
            sys.exit(f"{way}: {output.read()}")
        summary = json.loads((Path(runs) / "run/summary.json").read_text())
        lines = (Path(runs) / "run/metrics.jsonl").read_text().splitlines()
    windows = [record for record in map(json.loads, lines) if record["split"] == "train"]
    steps = [record["step"] for record in windows]
    assert steps == sorted(set(steps)), f"{way}: {steps}"
    assert len([line for line in lines if '"test"' in line]) == summary["epochs"], way
    image_s = [WINDOW / record["images_per_s"] for record in windows]  # for an image of each step
    images = summary["train_images_per_s"] * summary["train_s"] / summary["steps"]
    return Run(summary["train_s"], images * image_s[0], images * cost(image_s, ran))


def stop_by_lot(training: "Popen[bytes]", history: Path, lots: random.Random) -> list[bool]:
    """Stop all that talks to W&B, and let it run in one of each two windows; return in which it ran."""
    ran = [True] + [answer for _ in range(10**4) for answer in lots.sample([True, False], 2)]
    mirror = None
    while mirror is None and training.poll() is None:  # it starts when torch is imported
        time.sleep(0.02)
        mirror = next(
            (process for process in below(training.pid) if "distlenet.tracking.sender" in command(process)), None
        )
    if mirror is None:  # the training's end says why
        return ran
    stopped: dict[int, psutil.Process] = {}
    try:
        for window in windows(training, history):
            if ran[window]:
                resume(stopped)
                continue
            for process in [mirror, *below(mirror.pid)]:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    stopped[process.pid] = process
    finally:
        resume(stopped)
    return ran


def resume(stopped: dict[int, psutil.Process]) -> None:
    """Let processes go on."""
    for process in stopped.values():
        with contextlib.suppress(psutil.Error):
            process.resume()
    stopped.clear()


def below(parent: int) -> list[psutil.Process]:
    """Return all processes that a process has started, and those that they have."""
    try:
        return psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []


def command(process: psutil.Process) -> list[str]:
    """Return the words of a process; none, where it has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def windows(training: "Popen[bytes]", history: Path) -> Iterator[int]:
    """Yield the number of each window, from 0, when it begins."""
    seen, file = 0, None
    while training.poll() is None and not history.with_name("summary.json").exists():
        time.sleep(0.003)
        if file is None and history.exists():
            file = history.open()
        if file is not None and (more := file.read().count('"train"')):
            seen += more
            yield seen


def cost(seconds: list[float], ran: list[bool]) -> float:
    """Sum up what the windows with W&B took beyond those beside them without; the first and a last odd one are none."""
    pairs = range(1, min(len(seconds), len(ran)) - 1, 2)
    return sum((seconds[i] - seconds[i + 1]) * (1 if ran[i] else -1) for i in pairs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="how W&B is there (all)")
    parser.add_argument("--within", action="store_true", help="stop W&B in every other window of a run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the training")
    arguments = parser.parse_intermixed_args()
    if arguments.within:
        within(arguments.ways, arguments.rounds, arguments.ranks, arguments.settings)
        return
    ways = ["disabled", *arguments.ways]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            seconds[way].append(train(way, arguments.ranks, arguments.settings, None).train_s)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| W&B | seconds of training | beside none |")
    print("| --- | ---: | ---: |")
    for way, times in seconds.items():
        ratios = [mine / none for mine, none in zip(times, seconds["disabled"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {way} | {statistics.median(times):.2f} | {spread} |")


def within(ways: list[str], rounds: int, ranks: int, settings: list[str]) -> None:
    """Measure inside each run, and print."""
    lots = random.Random(0)
    shares: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        without = train("disabled", ranks, settings, None)
        for way, found in shares.items():
            run = train(way, ranks, settings, lots)
            found.append((run.cost_s + run.first_s - without.first_s) / run.train_s)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    print("| W&B | its share of the training's time |")
    print("| --- | ---: |")
    for way, found in shares.items():
        print(f"| {way} | {statistics.median(found):.2%} ({min(found):.2%} to {max(found):.2%}) |")


if __name__ == "__main__":
    main()
