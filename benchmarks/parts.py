"""The time of each part of a training step: load, augment, forward, backward, all-reduce, optimizer, and the rest.

``python benchmarks/parts.py [--ranks 1 2] [--batches 64 256]``: a normal trainer with a clock around each part.
Steps alternate between two kinds, with and without an all-reduce in the backward pass; the difference is the time
waited for the all-reduce. Medians over STEPS steps of each kind, on rank 0.
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
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from reduction_cost import batches, make_trainer

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.reduction import ddp
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
    reduction_step: Any = ddp._DdpStep
    reduction_step.backward = clocks.around("backward", reduction_step.backward)
    step.meter.update = clocks.around("meter", step.meter.update)
    step.scaler.step = clocks.around("optimizer", step.scaler.step)


def measure(batch: int) -> None:
    """Measure as one rank; rank 0 prints the row for global batches of ``batch`` images."""
    config = load_config([], ["train.epochs=1000", "optim.lr=0.02", f"train.global_batch_size={batch}"])
    rows: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as scratch, init_distributed(config) as context:
        trainer = make_trainer(config, context, Path(scratch), Preemption(25))
        clocks = Clocks(context.device)
        model: Any = trainer.reducer.model
        add_clocks(trainer, clocks)
        feed = batches(trainer)
        load, take = clocks.around("load", lambda: next(feed)), clocks.around("step", trainer.step)
        for number in range(2 * (WARM_UP + STEPS)):
            reduces = number % 2 == 0
            clocks.step.clear()
            with nullcontext() if reduces else model.no_sync():
                take(load())
            rows[reduces].append({**clocks.step, "step": clocks.step["step"] + clocks.step["load"]})
        trainer.close()
        if context.env.rank == 0:
            print(row(context.env.world_size, batch, rows), flush=True)


def row(ranks: int, batch: int, rows: dict[bool, list[dict[str, float]]]) -> str:
    """Return a table row with the medians in milliseconds."""
    full, alone = (
        {part: statistics.median(step[part] for step in steps[WARM_UP:]) for part in steps[-1]}
        for steps in (rows[True], rows[False])
    )
    parts = {**full, "backward": alone["backward"], "all-reduce": full["backward"] - alone["backward"]}
    parts["rest"] = full["step"] - sum(value for part, value in parts.items() if part != "step")
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
