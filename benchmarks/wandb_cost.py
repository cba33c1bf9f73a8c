"""What W&B costs the training, with a server that answers, and with bad ones: ``python benchmarks/wandb_cost.py``.

In each round the same training runs once without W&B, then once in each other way; the time is that in the training
loop, which the process that talks to W&B shares the processors with. Ratios are taken within a round.

On a shared machine one run is 10 % slower than the next for other reasons. So each run is also held against itself:
what its windows of WINDOW steps took beyond its median window is lost, and what is lost with W&B beyond what is lost
without it, W&B has cost, but for what it costs evenly all along.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from wandb_server import WandbServer

WINDOW = 25
"""Steps."""

WAYS = ("disabled", "offline", "well", "slow", "error", "hang", "drop", "nobody there")


def environment(way: str, server: WandbServer) -> dict[str, str]:
    """Set W&B up for a way."""
    if way in ("disabled", "offline"):
        return {"WANDB_MODE": way}
    server.manner = way
    found = dict(server.environ)
    if way == "nobody there":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found["WANDB_BASE_URL"] = f"http://127.0.0.1:{probe.getsockname()[1]}"
    return found


@dataclass(frozen=True)
class Times:
    """Of one training, seconds: in its loop, and lost there beside its own median window."""

    train: float
    lost: float


def train(way: str, ranks: int, settings: list[str]) -> Times:
    """Train once. Exits where the run failed or its history has gaps."""
    server = WandbServer()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as runs:
        words = [
            "-m",
            "distlenet.train",
            f"run.dir={runs}",
            "run.name=run",
            "wandb.finish_s=2",
            f"train.log_every={WINDOW}",
        ]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment(way, server)}
        ended = subprocess.run([*launcher, *words, *settings], env=environ, capture_output=True, text=True)
        server.close()
        if ended.returncode:
            sys.exit(f"{way}: {ended.stdout}\n{ended.stderr}")
        summary = json.loads((Path(runs) / "run/summary.json").read_text())
        lines = (Path(runs) / "run/metrics.jsonl").read_text().splitlines()
    windows = [record for record in map(json.loads, lines) if record["split"] == "train"]
    steps = [record["step"] for record in windows]
    assert steps == sorted(set(steps)), f"{way}: {steps}"
    assert len([line for line in lines if '"test"' in line]) == summary["epochs"], way
    seconds = [WINDOW / record["images_per_s"] for record in windows]  # for an image of each step
    images = summary["train_images_per_s"] * summary["train_s"] / summary["steps"]
    lost = images * sum(one - statistics.median(seconds) for one in seconds)
    return Times(float(summary["train_s"]), lost)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--ways", nargs="+", choices=WAYS[1:], default=WAYS[1:], help="how W&B is there (all)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the training")
    arguments = parser.parse_intermixed_args()
    ways = ["disabled", *arguments.ways]
    seconds: dict[str, list[Times]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            seconds[way].append(train(way, arguments.ranks, arguments.settings))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| W&B | seconds of training | beside none | lost | lost beyond none, of the training |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, times in seconds.items():
        pairs = list(zip(times, seconds["disabled"], strict=True))
        ratios = [mine.train / none.train for mine, none in pairs]
        costs = [(mine.lost - none.lost) / none.train for mine, none in pairs]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        cost = f"{statistics.median(costs):.1%} ({min(costs):.1%} to {max(costs):.1%})"
        train_s, lost_s = (
            statistics.median(values) for values in zip(*((t.train, t.lost) for t in times), strict=True)
        )
        print(f"| {way} | {train_s:.2f} | {spread} | {lost_s:.2f} s | {cost} |")


if __name__ == "__main__":
    main()
