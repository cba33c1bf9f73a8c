"""Where the time of a training step goes: load, augment, forward, backward, all-reduce, optimizer, and the rest.

``python benchmarks/parts.py [--ranks 1 2] [--batches 64 256]``: a trainer as in training, with a clock around each
part. Steps come in turns of two kinds, with and without an all-reduce behind the backward pass; what the first take
longer there is the wait for the all-reduce. Medians over STEPS steps of each kind, rank 0.
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
from reduction_cost import batches

from distlenet.config.loading import load_config
from distlenet.data.sources import load_on_node
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import handle_preemption
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer

STEPS, WARM_UP = 300, 30
PARTS = ("load", "augment", "forward", "backward", "all-reduce", "meter", "optimizer", "rest", "step")


class Clocks:
    """Adds up the time of each part of the step under way, milliseconds."""

    def __init__(self, device: torch.device) -> None:
        """Measure on ``device``: a GPU is waited for before each look at the clock."""
        self.device = device
        self.now: dict[str, float] = defaultdict(float)

    def time(self) -> float:
        """Return the time at which the device has done all it was told, milliseconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def around(self, part: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``action`` with a clock around it."""

        def timed(*arguments: Any) -> Any:
            started = self.time()
            result = action(*arguments)
            self.now[part] += self.time() - started
            return result

        return timed


def watch(trainer: Trainer, clocks: Clocks) -> None:
    """Put clocks around the parts of ``trainer``'s step."""
    step: Any = trainer.take_step
    step.prepare.augmented = clocks.around("augment", step.prepare.augmented)
    step.reduction.model = clocks.around("forward", step.reduction.model)
    step.reduction.backward = clocks.around("backward", step.reduction.backward)
    step.meter.update = clocks.around("meter", step.meter.update)
    step.scaler.step = clocks.around("optimizer", step.scaler.step)


def measure(batch: int) -> None:
    """Be one rank; rank 0 prints the table's row for ``batch`` images a step."""
    config = load_config([], ["train.epochs=1000", "optim.lr=0.02", f"train.global_batch_size={batch}"])
    rows: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory() as scratch,
        handle_preemption(25) as preemption,
        init_distributed(config) as context,
    ):
        data = load_on_node(config.data, context.env)
        trainer = Trainer(config, context, data, Path(scratch), Trackers([]), preemption)
        trainer.take_step.settle(trainer.feed.no_images)
        clocks = Clocks(context.device)
        model: Any = trainer.reduction.model
        watch(trainer, clocks)
        feed = batches(trainer)
        load, take = clocks.around("load", lambda: next(feed)), clocks.around("step", trainer.train_step)
        for number in range(2 * (WARM_UP + STEPS)):
            reduces = number % 2 == 0
            clocks.now.clear()
            with nullcontext() if reduces else model.no_sync():
                take(*load())
            rows[reduces].append({**clocks.now, "step": clocks.now["step"] + clocks.now["load"]})
        trainer.checkpointer.close()
        if context.env.rank == 0:
            print(row(context.env.world_size, batch, rows), flush=True)


def row(ranks: int, batch: int, rows: dict[bool, list[dict[str, float]]]) -> str:
    """Write one row: medians, milliseconds."""
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
