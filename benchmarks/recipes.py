"""Accuracy and training time of a recipe over several seeds, compared with another recipe.

``python benchmarks/recipes.py sprint --seeds 5 --against tutorial``: the recipe trains on 2 ranks, the other one in one
process, alternately. Training time is the time in the training loop, without start and evaluation.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]


def train(recipe: str, seed: int, ranks: int, settings: list[str]) -> tuple[float, float]:
    """Train once; return the last evaluation's accuracy (0 to 1) and the training time, seconds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher = launcher if ranks > 1 else [sys.executable]
    with tempfile.TemporaryDirectory(prefix="recipe-") as runs:
        words = ["-m", "distlenet.train", "--config", REPO / f"configs/{recipe}.yaml", f"seed={seed}", *settings]
        command = [*launcher, *words, f"run.dir={runs}", "run.name=run"]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(runs) / "run/summary.json").read_text())
    return summary["test_accuracy"], summary["train_s"]


def main() -> None:
    """Train with each seed and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a file in configs/, without .yaml")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (5)")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--against", metavar="RECIPE", help="a recipe to compare training times with, in one process")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the recipe")
    arguments = parser.parse_intermixed_args()
    accuracies, times, ratios = [], [], []
    for seed in range(arguments.seeds):
        accuracy, seconds = train(arguments.recipe, seed, arguments.ranks, arguments.settings)
        line = f"seed {seed}: {accuracy:.2%} in {seconds:.2f} s"
        if arguments.against:
            other_accuracy, other_seconds = train(arguments.against, seed, 1, [])
            ratios.append(other_seconds / seconds)
            line += f"; {arguments.against} {other_accuracy:.2%} in {other_seconds:.2f} s; ratio {ratios[-1]:.1f}"
        accuracies.append(accuracy)
        times.append(seconds)
        print(line, flush=True)
    print(f"mean accuracy {statistics.mean(accuracies):.2%}, median time {statistics.median(times):.2f} s", end="")
    print(f", median ratio {statistics.median(ratios):.1f}" if ratios else "")


if __name__ == "__main__":
    main()
