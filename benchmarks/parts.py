"""The time of each part of a training step: load, augment, forward, backward, all-reduce, optimizer, and the rest.

``python benchmarks/parts.py [--ranks 1 2] [--batches 64 256]``: a normal trainer with a clock around each part,
without a CUDA graph. The all-reduce includes the wait for the other ranks. Medians over STEPS steps, on rank 0.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reduction_cost import batches, make_trainer

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.reduction import flat
from distlenet.training.trainer import Trainer

STEPS, WARM_UP = 300, 30
PARTS = ("load", "augment", "forward", "backward", "all-reduce", "meter", "optimizer", "rest", "step")


class Clocks:
    """The time of each part of the current step, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        """Measure on ``device``; a GPU is synchronized before each reading."""
        self.device = device
        self.step: dict[str, float] = defaultdict(float)

    def time(self) -> float:
        """Return the time in milliseconds, after all work of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def around(self, part: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``action``, timed as ``part``."""

        def timed(*arguments: Any) -> Any:
            started = self.time()
            result = action(*arguments)
            self.step[part] += self.time() - started
            return result

        return timed


def add_clocks(trainer: Trainer, clocks: Clocks) -> None:
    """Time the parts of the trainer's steps."""
    step: Any = trainer.train_step.on_device
    step.task.transform = clocks.around("augment", step.task.transform)
    step.task.loss = clocks.around("forward", step.task.loss)
    reducer: Any = step.reducer
    reducer.all_reduce = clocks.around("all-reduce", reducer.all_reduce)
    reduction_step: Any = flat._FlatStep
    reduction_step.backward = clocks.around("backward", reduction_step.backward)
    step.meter.update = clocks.around("meter", step.meter.update)
    step._take_step = clocks.around("optimizer", step._take_step)


def measure(batch: int) -> None:
    """Measure as one rank; rank 0 prints the row for global batches of ``batch`` images."""
    words = ["train.epochs=1000", "optim.lr=0.02", "train.cuda_graph=off", f"train.global_batch_size={batch}"]
    config, steps = load_config([], words), list[dict[str, float]]()
    with tempfile.TemporaryDirectory() as scratch, init_distributed(config) as context:
        trainer = make_trainer(config, context, Path(scratch), Preemption(25))
        clocks = Clocks(context.device)
        add_clocks(trainer, clocks)
        feed = batches(trainer)
        load, take = clocks.around("load", lambda: next(feed)), clocks.around("step", trainer.step)
        for _ in range(WARM_UP + STEPS):
            clocks.step.clear()
            take(load())
            steps.append({**clocks.step, "step": clocks.step["step"] + clocks.step["load"]})
        trainer.close()
        if context.env.rank == 0:
            print(row(context.env.world_size, batch, steps), flush=True)


def row(ranks: int, batch: int, steps: list[dict[str, float]]) -> str:
    """Return a table row with the medians in milliseconds."""
    parts = {part: statistics.median(step[part] for step in steps[WARM_UP:]) for part in steps[-1]}
    parts["rest"] = parts["step"] - sum(value for part, value in parts.items() if part != "step")
    return f"| {ranks} | {batch} | {' | '.join(f'{parts[part]:.2f}' for part in PARTS)} |"


def main() -> None:
    """Measure as one rank, or start the ranks for each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="global batches (64 256 1024)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.batches[0])
        return
    print(f"Milliseconds\n\n| ranks | global batch | {' | '.join(PARTS)} |")
    print("| ---: " * (len(PARTS) + 2) + "|", flush=True)
    for ranks in arguments.ranks:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        for batch in arguments.batches:
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
            subprocess.run([*launcher, __file__, "--batches", str(batch)], env=environ, check=True)


if __name__ == "__main__":
    main()
