"""The scaling of training: a model of all-reduce and step, fitted to measurements on these ranks, and its predictions.

``torchrun --nproc-per-node=2 benchmarks/scaling.py``, or under srun on a cluster; rank 0 prints Markdown. With
``--from FILE``, one process uses the all-reduce times of ``python -m distlenet.preflight --allreduce --json``. Model:

    all-reduce of n bytes over W ranks, as a ring    2 (W-1) α + 2 (W-1)/W n β
                                        as a tree    2 log2(W) α + 2 n β
    step of b images on a rank                       s + b c

α is the time per message, β the time per byte (Thakur, Rabenseifner & Gropp, "Optimization of Collective Communication
Operations in MPICH", 2005), s the fixed time of a step, c the time per image. The model assumes no overlap.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from distlenet.config.loading import load_config
from distlenet.config.schema import ModelConfig
from distlenet.distributed.context import init_distributed
from distlenet.models.networks import make_model
from distlenet.preflight.allreduce import Timing, fit_line, median_s, time_all_reduces

SIZES = [4**k for k in range(1, 12)]  # bytes, 4 B to 4 MiB
BATCHES = [16, 32, 64, 128, 256, 512]
WORLDS = [8, 64, 512, 4096]
EFFICIENCY = 0.9


def step(batch: int, device: torch.device) -> Callable[[], None]:
    """Return a training step of one rank on a batch in memory."""
    net = make_model(ModelConfig()).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    images, labels = torch.randn(batch, 1, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

    def take() -> None:
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def batch_for(efficiency: float, all_reduce: float, s: float, c: float) -> int:
    """Return the images per rank at which the step takes the share ``efficiency`` of step plus all-reduce."""
    return max(1, math.ceil((efficiency / (1 - efficiency) * all_reduce - s) / c))


def timing_of(file: Path) -> Timing:
    """Read the times that preflight measured."""
    timed = json.loads(file.read_text())["all_reduce"]
    return Timing(**{**timed, "seconds": {int(size): seconds for size, seconds in timed["seconds"].items()}})


def main() -> None:
    """Measure, fit, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="file", metavar="FILE", type=Path, help="the output of preflight --allreduce --json"
    )
    file = parser.parse_args().file
    with init_distributed(load_config()) as context:
        device = context.device
        if file is None and context.env.world_size < 2:
            raise SystemExit(
                "an all-reduce needs at least 2 ranks: start this with torchrun or srun, or give --from FILE"
            )
        timing = time_all_reduces(SIZES, device) if file is None else timing_of(file)
        world_size = timing.ranks
        steps = {batch: median_s(step(batch, device), device) for batch in BATCHES}
        gradient = 4 * sum(p.numel() for p in make_model(ModelConfig()).parameters())
        rank_0, backend, name = context.env.rank == 0, context.backend, context.describe()["device"]
    if not rank_0:
        return
    times, intercept, slope = timing.seconds, timing.latency_s, timing.seconds_per_byte
    alpha, beta = intercept / (2 * (world_size - 1)), slope * world_size / (2 * (world_size - 1))
    s, c = fit_line(list(steps), list(steps.values()))
    fit = f"α = {1e6 * alpha:.0f} µs, 1/β = {1e-9 / beta if beta else math.inf:.2f} GB/s"
    print(f"{world_size} ranks, {backend}, {name}. {fit}; s = {1e3 * s:.2f} ms, c = {1e6 * c:.1f} µs per image.\n")
    print("| all-reduce of | measured | model |\n| ---: | ---: | ---: |")
    for size, seconds in times.items():
        print(f"| {size:,} B | {1e6 * seconds:,.0f} µs | {1e6 * (intercept + slope * size):,.0f} µs |")
    print("\n| step of | measured | model |\n| ---: | ---: | ---: |")
    for batch, seconds in steps.items():
        print(f"| {batch} images | {1e3 * seconds:.2f} ms | {1e3 * (s + c * batch):.2f} ms |")
    print(f"\nPredicted for gradients of {gradient:,} bytes and {EFFICIENCY:.0%} efficiency:\n")
    print("| ranks | ring | images per rank | global batch | tree | images per rank | global batch |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in WORLDS:
        ring = 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * gradient * beta
        tree = 2 * math.log2(ranks) * alpha + 2 * gradient * beta
        cells = []
        for seconds in (ring, tree):
            batch = batch_for(EFFICIENCY, seconds, s, c)
            cells.append(f"{1e3 * seconds:,.2f} ms | {batch:,} | {batch * ranks:,}")
        print(f"| {ranks:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
