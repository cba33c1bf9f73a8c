"""What a run in an object store costs: the speed of training with ``run.dir`` on the disk and in an S3 server.

``python benchmarks/object_store.py [--rounds 5] [--every 100]``: LeNet on Fashion-MNIST, two ranks, a checkpoint every
``--every`` steps. In each round, runs alternate, in rotating order: on the disk, in a store that answers at once, in
one that takes a second for each request, and in one whose bucket is full, so that each upload fails. The server is
moto's, on the same machine, and takes a part of its CPU time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from s3_server import S3Server

CASES: dict[str, dict[str, Any] | None] = {
    "disk": None,
    "store": {},
    "store, 1 s per request": {"kind": "slow", "seconds": 1.0},
    "store, bucket full": {"kind": "full", "method": "PUT", "path": "checkpoints|metrics"},
}


def train(directory: Path, every: int, environment: dict[str, str], *words: str) -> float:
    """Return the images per second of a run."""
    command = [sys.executable, "-m", "distlenet.launch", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train"]
    settings = [
        f"checkpoint.every_steps={every}",
        "train.epochs=2",
        "device=cpu",
        "run.report=never",
        "wandb.mode=disabled",
    ]
    output = subprocess.run(
        [*command, *settings, f"run.local_dir={directory}", *words, "run.name=run", "distributed.init_timeout_s=30"],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    summaries = list(directory.rglob("summary.json"))
    if len(summaries) != 1:
        sys.exit(output.stdout + output.stderr)
    return float(json.loads(summaries[0].read_text())["train_images_per_s"])


def main() -> None:
    """Measure in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each case (5)")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (100)")
    arguments = parser.parse_args()
    server = S3Server()
    speeds: dict[str, list[float]] = {case: [] for case in CASES}
    for round_ in range(arguments.rounds):
        first = round_ % len(CASES)
        for case, faults in [*CASES.items()][first:] + [*CASES.items()][:first]:
            server.fail(**(faults or {}))
            with tempfile.TemporaryDirectory() as directory:
                url = f"s3://runs/{round_}-{len(case)}" if faults is not None else directory
                speeds[case].append(train(Path(directory), arguments.every, server.environment, f"run.dir={url}"))
    print(f"LeNet on Fashion-MNIST, 2 ranks, a checkpoint every {arguments.every} steps, {arguments.rounds} rounds.\n")
    print("| run.dir | images per second, median (range) | of the disk, paired median |\n| --- | ---: | ---: |")
    for case, values in speeds.items():
        ratio = statistics.median(value / disk for value, disk in zip(values, speeds["disk"], strict=True))
        print(f"| {case} | {statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f}) | {ratio:.3f} |")


if __name__ == "__main__":
    main()
