"""What ``distributed.reduction=exact`` costs: training speed beside ``ddp``, in pairs, one after the other.

Prints each pair's images/s and the median of their ratio. Extra arguments are settings of both runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def images_per_s(ranks: int, reduction: str, settings: list[str]) -> float:
    """Train once and return ``train_images_per_s`` of its summary."""
    with tempfile.TemporaryDirectory(prefix="reduction-") as scratch:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        words = ("-m", "distlenet.train", f"distributed.reduction={reduction}", f"run.dir={scratch}", "run.name=run")
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, *words, *settings], env=environ, check=True, stdout=subprocess.DEVNULL)
        return float(json.loads((Path(scratch) / "run/summary.json").read_text())["train_images_per_s"])


def main() -> None:
    """Measure the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--pairs", type=int, default=5, help="number of pairs (5)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of both (train.epochs=1)")
    arguments = parser.parse_intermixed_args()
    settings = ["train.epochs=1", *arguments.settings]
    ratios = []
    for pair in range(arguments.pairs):
        order = ("ddp", "exact") if pair % 2 == 0 else ("exact", "ddp")
        speed = {reduction: images_per_s(arguments.ranks, reduction, settings) for reduction in order}
        ratios.append(speed["exact"] / speed["ddp"])
        print(f"ddp {speed['ddp']:8.0f}  exact {speed['exact']:8.0f} images/s  ratio {ratios[-1]:.2f}", flush=True)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"exact / ddp: median {middle:.2f} ({low:.2f} to {high:.2f}) of {arguments.pairs} pairs")


if __name__ == "__main__":
    main()
