"""Large networks on a CPU: how long a checkpoint stops training, and the memory of checkpoints, checks and exact sums.

``python benchmarks/growth.py [--parameters 100e6] [--moments 2] [--rounds 5] [--only checkpoint replicas exact]``: the
network is synthetic, and each part runs in a new process. A checkpoint holds the weights and ``--moments`` tensors of
the same size, 2 as with AdamW. The state is in memory up to three times: 1e9 parameters with 0 moments take 13 GB.

In each round, a plain copy to new memory and a save alternate. Training stops for the save's check that all weights are
finite, and for its copy. Memory is the rise of the process's peak (VmHWM), in units of the state.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore
from distlenet.config.loading import load_config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.exact import ExactReducer
from distlenet.reduction.replica_check import check_replicas
from distlenet.training.train_step import TrainStep
from distlenet.utils.nested import map_tensors

LAYER = 4096  # square layers of 16.8 M parameters, as in large networks
TITLES = {
    "checkpoint": "| parameters | checkpoint | plain copy | stop, first save | stop, later saves: check + copy | write "
    "| load | memory of the first save | of later saves | of loading |\n"
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    "replicas": "| parameters | check of replicas | memory |\n| ---: | ---: | ---: |",
    "exact": "| parameters | exact step, 4 shards | memory in addition to weights, bytes per parameter |\n"
    "| ---: | ---: | ---: |",
}


def measure(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Return the seconds that a call takes, and by how many bytes the peak of this process's memory rises."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present size
    before, started = _peak(), time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started, 1024.0 * (_peak() - before)


def _peak() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def make_model(parameters: int) -> nn.Module:
    """Return a network with about this number of ``parameters``: layers that are not applied to data."""
    layers, rest = divmod(parameters, LAYER * LAYER)
    sizes = [LAYER * LAYER] * layers + [rest] * (rest > 0)
    return nn.ParameterList([nn.Parameter(torch.full((size,), 0.5)) for size in sizes])


def spread(values: list[float]) -> str:
    """Format a median and the range."""
    return f"{statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g})"


def checkpoint(parameters: int, moments: int, rounds: int, directory: Path) -> str:
    """Save and load; return the cells of a row."""
    model = make_model(parameters)
    weights = cast(dict[str, Any], model.state_dict())
    state = {
        "model": weights,
        "optimizer": [map_tensors(torch.ones_like, weights) for _ in range(moments)],
        "config": load_config([], []).to_dict(),
        "step": 1,
        "epoch": 0,
    }
    size = 4.0 * parameters * (1 + moments)
    store = CheckpointStore(directory, keep_last=1)
    step = cast(TrainStep, SimpleNamespace(on_device=SimpleNamespace(model=model)))
    stops: list[float] = []

    def save() -> None:
        started = time.perf_counter()
        TrainStep.check_finite(step)
        store.save(state)
        stops.append(time.perf_counter() - started)
        if failure := store.wait():
            raise RuntimeError(failure)

    def first_save() -> None:
        store.reserve(state)  # as after the first step
        store.wait()
        save()

    _, first_memory = measure(first_save)
    write, later_memory = measure(save)
    first, checks, copies, plain = stops[0], list[float](), list[float](), list[float]()
    for _ in range(rounds):
        started = time.perf_counter()
        copy = map_tensors(lambda tensor: tensor.to("cpu", copy=True), state)
        plain.append(time.perf_counter() - started)
        del copy
        checks.append(measure(TrainStep.check_finite, step)[0])
        started = time.perf_counter()
        store.save(state)
        copies.append(time.perf_counter() - started)
        store.wait()
    load, load_memory = measure(load_checkpoint, directory / "last.pt")
    stop = f"{spread([a + b for a, b in zip(checks, copies, strict=True)])}: "
    stop += f"{statistics.median(checks):.3g} + {statistics.median(copies):.3g}"
    memory = " | ".join(f"{peak / size:.2f} ×" for peak in (first_memory, later_memory, load_memory))
    return f"{size / 1e9:.2f} GB | {spread(plain)} | {first:.3g} s | {stop} | {write:.3g} s | {load:.3g} s | {memory}"


def replicas(parameters: int, rounds: int) -> str:
    """Check the replicas of a single rank; return the cells of a row."""
    model = make_model(parameters)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    check_replicas(make_model(1000))  # warm up
    measured = [measure(check_replicas, model) for _ in range(rounds)]
    dist.destroy_process_group()
    seconds, memory = zip(*measured, strict=True)
    return f"{spread(list(seconds))} | {max(memory) / 2**20:,.0f} MiB"


def exact(parameters: int, rounds: int) -> str:
    """Reduce a step of a single rank; return the cells of a row."""
    model, reducer = make_model(parameters), list[ExactReducer]()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def step() -> None:
        if not reducer:
            reducer.append(ExactReducer(model, DistributedEnvironment(), 4, 1, check_finite=True))
        model.zero_grad()
        with reducer[0].step(4, torch.tensor(0.0)) as reduction:
            for micro_batch in reduction.micro_batches(torch.ones(4)):
                parts = [(parameter * 1e-3).sum() for parameter in model.parameters()]
                reduction.backward(torch.stack(parts).sum() * micro_batch.data.sum())

    _, memory = measure(step)  # with the buffers of the reducer
    seconds = [measure(step)[0] for _ in range(rounds)]
    dist.destroy_process_group()
    return f"{spread(seconds)} | {memory / parameters:.1f}"


def main() -> None:
    """Print a table for each part, measured in a new process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e8], help="sizes of the network (1e8)")
    parser.add_argument("--moments", type=int, default=2, help="tensors of the optimizer per parameter (2)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (5)")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), help="parts (all)")
    parser.add_argument("--directory", type=Path, help="where checkpoints are written (a temporary directory)")
    parser.add_argument("--part", choices=TITLES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes, moments, rounds = [int(size) for size in arguments.parameters], arguments.moments, arguments.rounds
    if arguments.part == "checkpoint":
        with tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.directory) as directory:
            print(checkpoint(sizes[0], moments, rounds, Path(directory)))
    elif arguments.part is not None:
        print({"replicas": replicas, "exact": exact}[arguments.part](sizes[0], rounds))
    else:
        own = [sys.executable, __file__, "--moments", str(moments), "--rounds", str(rounds)]
        own += ["--directory", str(arguments.directory)] if arguments.directory else []
        for part in arguments.only:
            print(f"{TITLES[part]}", flush=True)
            for size in sizes:
                words = [*own, "--part", part, "--parameters", str(size)]
                ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                print(f"| {size / 1e6:,.0f} M | {ended.stdout.strip()} |", flush=True)
            print()


if __name__ == "__main__":
    main()
