"""The cost of other ways to sum gradients, compared with the default: interleaved steps in the same processes.

``python benchmarks/reduction_cost.py [--ranks 2] [--batches 64 256 1024] [--only auto] [--rounds 20]``: for each global
batch, each round takes some steps in each way: DistributedDataParallel with other options, and the exact reduction with
several numbers of virtual shards. Ratios are computed within a round; the table has their median and quartiles.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.reduction import factory, wrapped_model
from distlenet.task import Batch
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer

STEPS = 15  # of a way in a round
OPTIONS: dict[str, dict[str, Any]] = {
    "ddp, wrapped": wrapped_model.OPTIONS,  # by DistributedDataParallel, as on GPUs and between machines
    "ddp, buckets of 64 KiB": {**wrapped_model.OPTIONS, "bucket_cap_mb": 1 / 16},
    "ddp, static graph": {**wrapped_model.OPTIONS, "static_graph": True},
    "ddp, gradients copied": {"gradient_as_bucket_view": False},
}
fits_flat = factory.fits_flat_buffer
BF16 = "ddp, bf16 between ranks"
SHARDS = (2, 4, 8)
GLOO = "distributed.shared_memory=off"


def make_trainer(config: Config, context: DistributedContext, run_dir: Path, preemption: Preemption) -> Trainer:
    """Make a trainer that is ready for its first step. A collective."""
    trainer = Trainer(config, context, ImageClassification(config), run_dir, Trackers([]), preemption)
    trainer.train_step.warm_up()
    return trainer


def batches(trainer: Trainer) -> Iterator[Batch]:
    """Yield the batches of one epoch after another."""
    for epoch in count():
        yield from trainer.loader.epoch(epoch)


def measure(batch: int, rounds: int, only: list[str]) -> None:
    """Measure ddp, and the ways with a part of ``only`` in their names, as one rank; rank 0 prints the rows."""
    exact = "distributed.reduction=exact"
    ways: dict[str, list[str]] = (
        {"ddp": []} | {name: [] for name in OPTIONS} | {BF16: ["distributed.gradient_compression=bf16"]}
    )
    ways |= {"exact, auto shards": [exact]}
    ways |= {f"exact, {shards} shards": [exact, f"distributed.virtual_shards={shards}"] for shards in SHARDS}
    ways |= {f"{name}, by Gloo": [*ways[name], GLOO] for name in ("ddp", f"exact, {SHARDS[0]} shards")}
    ways = {name: more for name, more in ways.items() if name == "ddp" or any(part in name for part in only)}
    common = ["train.epochs=1000", "optim.lr=0.02", f"train.global_batch_size={batch}"]
    configs = [load_config([], [*common, *settings]) for settings in ways.values()]
    trainers = []
    with tempfile.TemporaryDirectory() as scratch, init_distributed(configs[0]) as context:
        for name, config in zip(ways, configs, strict=True):
            wrapped_model.OPTIONS = OPTIONS.get(name, OPTIONS["ddp, wrapped"])
            factory.fits_flat_buffer = lambda *arguments, wraps=name in OPTIONS: not wraps and fits_flat(*arguments)
            trainers.append(make_trainer(config, context, Path(scratch), Preemption(25)))
        feeds = [batches(trainer) for trainer in trainers]
        seconds: list[list[float]] = [[] for _ in trainers]
        contestants = list(zip(trainers, feeds, seconds, strict=True))
        for number in range(rounds + 2):
            turn = number % len(contestants)
            for trainer, feed, times in (*contestants[turn:], *contestants[:turn]):
                trainer.step(next(feed))  # warms the caches, which hold the data of another trainer
                started = time.perf_counter()
                for _ in range(STEPS):
                    trainer.step(next(feed))
                times.append((time.perf_counter() - started) / STEPS)
        for trainer in trainers:
            trainer.close()
        if context.env.rank == 0:
            for name, times in zip(ways, seconds, strict=True):
                ratios = [a / b for a, b in zip(times, seconds[0], strict=True)][2:]  # without two warm-up rounds
                speed = batch / statistics.median(times[2:])
                low, median, high = statistics.quantiles(ratios)
                print(f"| {batch} | {name} | {speed:,.0f} | {median:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def main() -> None:
    """Measure as one rank, or start the ranks for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="global batches")
    parser.add_argument("--rounds", type=int, default=20, help="rounds (20)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="only ways with one of these names")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.batches[0], arguments.rounds, arguments.only)
        return
    print(f"{arguments.ranks} ranks\n\n| global batch | reduction | images/s | time relative to ddp |")
    print("| ---: | --- | ---: | ---: |", flush=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}")
    same = ("--rounds", str(arguments.rounds), "--only", *arguments.only)
    for batch in arguments.batches:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        subprocess.run([*launcher, __file__, "--batches", str(batch), *same], env=environ, check=True)


if __name__ == "__main__":
    main()
