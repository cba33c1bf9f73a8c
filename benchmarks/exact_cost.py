"""What ``distributed.reduction=exact`` costs beside ``ddp``: training steps, in turn, in the same processes.

``python benchmarks/exact_cost.py [--ranks 2] [--batches 128 256 1024]``: for each global batch and number of virtual
shards, ROUNDS times: some steps with ddp, some with exact; the ratio is taken within a round.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from distlenet.config import load_config
from distlenet.data.loader import Batch
from distlenet.data.sources import load_on_node
from distlenet.preemption import listening
from distlenet.session import open_session
from distlenet.tracking import Trackers
from distlenet.trainer import Trainer

ROUNDS, STEPS = 20, 15
SHARDS = (2, 4, 8)


def batches(trainer: Trainer) -> Iterator[Batch]:
    """Load one epoch after the other."""
    epoch = 0
    while True:
        trainer.sampler.set_position(epoch, 0)
        trainer.at.batch = 0
        yield from trainer.train_loader
        epoch += 1


def measure(batch: int) -> None:
    """Be one rank; rank 0 prints the table's rows for ``batch`` images a step."""
    exact = "distributed.reduction=exact"
    variants = [["distributed.reduction=ddp"], *([exact, f"distributed.virtual_shards={count}"] for count in SHARDS)]
    common = ["train.epochs=1000", "optim.lr=0.02", f"train.global_batch_size={batch}"]
    configs = [load_config([], [*common, *variant]) for variant in variants]
    with tempfile.TemporaryDirectory() as scratch, listening(25) as preemption, open_session(configs[0]) as session:
        data = load_on_node(configs[0].data, session.world)
        trainers = [Trainer(c, session, data, Path(scratch), Trackers([]), preemption) for c in configs]
        feeds = [batches(trainer) for trainer in trainers]
        seconds: list[list[float]] = [[] for _ in trainers]
        for _ in range(ROUNDS):
            for trainer, feed, times in zip(trainers, feeds, seconds, strict=True):
                trainer.train_step(*next(feed))  # the other trainer's data leaves the caches
                started = time.perf_counter()
                for _ in range(STEPS):
                    trainer.train_step(*next(feed))
                times.append((time.perf_counter() - started) / STEPS)
        for trainer in trainers:
            trainer.checkpointer.close()
        if session.world.rank == 0:
            for shards, times in zip(("ddp", *SHARDS), seconds, strict=True):
                ratios = [a / b for a, b in zip(times, seconds[0], strict=True)][2:]  # two rounds to warm up
                speed = batch / statistics.median(times[2:])
                print(f"| {batch} | {shards} | {speed:,.0f} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    """Measure as one rank, or start the ranks for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256, 1024], help="global batches")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.batches[0])
        return
    print(f"{arguments.ranks} ranks\n\n| global batch | virtual shards | images/s | time beside ddp's |")
    print("| ---: | ---: | ---: | ---: |", flush=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}")
    for batch in arguments.batches:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        subprocess.run([*launcher, __file__, "--batches", str(batch)], env=environ, check=True)


if __name__ == "__main__":
    main()
