"""The cost of W&B for the training, with a working server and with broken ones: ``python benchmarks/wandb_cost.py``.

In each round the same training runs once without W&B and once in each other mode. The time is that of the training
loop, which shares the CPUs with the sidecar. Ratios are taken within a round.

On a shared machine the times of two runs differ by up to 10 %, so these ratios do not resolve 1 %. ``--within``
measures inside each run: in one of each two windows of WINDOW steps, chosen at random, the sidecar and W&B's process
are stopped (SIGSTOP). The cost is the additional time of the other windows, plus that of the first window, in which
nothing is stopped, compared with a run without W&B. It does not include W&B's work before the first step, and half of
its periodic work (it measures the machine every 15 s).
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

MODES = ("disabled", "offline", "ok", "slow", "error", "hang", "drop", "unreachable")


def environment(mode: str, server: WandbServer) -> dict[str, str]:
    """Return the environment variables for a mode."""
    if mode in ("disabled", "offline"):
        return {"WANDB_MODE": mode}
    server.behavior = mode
    environ = dict(server.environ)
    if mode == "unreachable":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{probe.getsockname()[1]}"
    return environ


@dataclass(frozen=True)
class Run:
    """Times of a training, in seconds: the loop, its first window, and the cost of W&B in the others."""

    train_s: float
    first_s: float
    cost_s: float


def train(mode: str, ranks: int, settings: list[str], rng: random.Random | None) -> Run:
    """Train once; with ``rng``, stop the sidecar in half of the windows. Exits if the run failed."""
    server = WandbServer()
    with tempfile.TemporaryDirectory() as runs, open(f"{runs}/output", "w+") as output:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *("-m", "distlenet.train", f"run.dir={runs}", "run.name=run", "wandb.finish_timeout_s=2"),
            f"train.log_every={WINDOW}",
            *settings,
        ]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment(mode, server)}
        with Popen(command, env=environ, stdout=output, stderr=output) as training:
            ran = stop_at_random(training, Path(runs) / "run/metrics.jsonl", rng) if rng else []
        server.close()
        if training.returncode:
            output.seek(0)
            sys.exit(f"{mode}: {output.read()}")
        summary = json.loads((Path(runs) / "run/summary.json").read_text())
        records = [json.loads(line) for line in (Path(runs) / "run/metrics.jsonl").read_text().splitlines()]
    windows = [record for record in records if record["split"] == "train"]
    steps = [record["step"] for record in windows]
    assert steps == sorted(set(steps)), f"{mode}: {steps}"
    assert len([record for record in records if record["split"] == "test"]) == summary["epochs"], mode
    image_s = [WINDOW / record["images_per_s"] for record in windows]  # for one image of each step
    images = summary["train_images_per_s"] * summary["train_s"] / summary["steps"]
    return Run(summary["train_s"], images * image_s[0], images * cost(image_s, ran))


def stop_at_random(training: "Popen[bytes]", history: Path, rng: random.Random) -> list[bool]:
    """Stop the sidecar and its descendants in one of each two windows; return in which windows they ran."""
    ran = [True] + [runs for _ in range(10**4) for runs in rng.sample([True, False], 2)]
    sidecar = None
    while sidecar is None and training.poll() is None:  # it starts after torch is imported
        time.sleep(0.02)
        sidecar = next((p for p in descendants(training.pid) if "distlenet.tracking.sender" in command_line(p)), None)
    if sidecar is None:  # train() reports why
        return ran
    stopped: dict[int, psutil.Process] = {}
    try:
        for window in windows(training, history):
            if ran[window]:
                resume(stopped)
                continue
            for process in [sidecar, *descendants(sidecar.pid)]:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
                    stopped[process.pid] = process
    finally:
        resume(stopped)
    return ran


def resume(stopped: dict[int, psutil.Process]) -> None:
    """Resume stopped processes."""
    for process in stopped.values():
        with contextlib.suppress(psutil.Error):
            process.resume()
    stopped.clear()


def descendants(pid: int) -> list[psutil.Process]:
    """Return all descendants of a process."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def command_line(process: psutil.Process) -> list[str]:
    """Return a process's command line; empty if it has just ended."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def windows(training: "Popen[bytes]", history: Path) -> Iterator[int]:
    """Yield the index of each window when it begins."""
    window, file = 0, None
    while training.poll() is None and not history.with_name("summary.json").exists():
        time.sleep(0.003)
        if file is None and history.exists():
            file = history.open()
        if file is not None and (new := file.read().count('"train"')):
            window += new
            yield window


def cost(seconds: list[float], ran: list[bool]) -> float:
    """Sum the additional time of the windows in which the sidecar ran, except the first and an unpaired last one."""
    pairs = range(1, min(len(seconds), len(ran)) - 1, 2)
    return sum((seconds[i] - seconds[i + 1]) * (1 if ran[i] else -1) for i in pairs)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (5)")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:], help="modes of W&B (all)")
    parser.add_argument("--within", action="store_true", help="stop the sidecar in every other window of a run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the training")
    arguments = parser.parse_intermixed_args()
    if arguments.within:
        within(arguments.modes, arguments.rounds, arguments.ranks, arguments.settings)
        return
    modes = ["disabled", *arguments.modes]
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(arguments.rounds):
        for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
            seconds[mode].append(train(mode, arguments.ranks, arguments.settings, None).train_s)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| W&B | seconds of training | ratio to disabled |")
    print("| --- | ---: | ---: |")
    for mode, times in seconds.items():
        ratios = [time_s / disabled_s for time_s, disabled_s in zip(times, seconds["disabled"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {mode} | {statistics.median(times):.2f} | {spread} |")


def within(modes: list[str], rounds: int, ranks: int, settings: list[str]) -> None:
    """Measure inside each run and print a table."""
    rng = random.Random(0)
    shares: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in range(rounds):
        without = train("disabled", ranks, settings, None)
        for mode in modes:
            run = train(mode, ranks, settings, rng)
            shares[mode].append((run.cost_s + run.first_s - without.first_s) / run.train_s)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    print("| W&B | share of the training time |")
    print("| --- | ---: |")
    for mode, values in shares.items():
        print(f"| {mode} | {statistics.median(values):.2%} ({min(values):.2%} to {max(values):.2%}) |")


if __name__ == "__main__":
    main()
