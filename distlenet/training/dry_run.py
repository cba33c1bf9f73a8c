"""``train --dry-run --world-size N``: what each of N ranks would do, composed in this process alone.

The trainer of rank 0 is built as for a job, on the CPU and with torch's fake process group, whose collectives give
back what they get. So every check that training makes of settings, data and ranks is made, and no step is taken.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distlenet.checkpoint.format import to_bytes
from distlenet.config.loading import run_folder
from distlenet.config.schema import Config
from distlenet.data.sources import load_data, require_local_data
from distlenet.data.transforms import SIZE
from distlenet.distributed.context import DistributedContext, set_threads
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.precision import resolve_precision
from distlenet.distributed.preemption import Preemption
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.rendezvous import host_key
from distlenet.distributed.watchdog import Watchdog
from distlenet.models.registry import make_model
from distlenet.reduction import micro_batch_size
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer


def plan(config: Config, world_size: int) -> list[tuple[str, str]]:
    """Compose the job of ``world_size`` ranks, and return its plan as (what, how much) in words.

    Raises UserError where training would, and where the data set is not on this machine: nothing is downloaded.
    """
    micro_batch_size(config, world_size)  # before the data: it is what users get wrong most
    require_local_data(config.data)
    config, left_out = on_this_machine(config)
    started_with = resident_bytes()
    with pretend(config, world_size) as context:
        data = load_data(config.data)
        trainer = Trainer(config, context, data, run_folder(config), Trackers(), Preemption(0.0))
        for parameter in trainer.net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.take_step.optimizer.step()  # makes its state; what it does to the network is thrown away with it
        checkpoint = len(to_bytes(trainer.state_dict()))
        rows = in_words(trainer, checkpoint, started_with, data.nbytes)
    return [*rows, ("not looked at here", left_out)] if left_out else rows


def resident_bytes() -> int:
    """Return how much memory this process has in use (proc(5): the second field of statm, in pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def on_this_machine(config: Config) -> tuple[Config, str]:
    """Return settings with which the CPU here can compose, and those of the given ones that need a GPU, in words."""
    left_out = [f"device={config.device}"] * (config.device == "cuda")
    left_out += [f"precision={config.precision}"] * (config.precision == "fp16")
    left_out += ["distributed.backend=nccl"] * (config.distributed.backend == "nccl")
    left_out += ["data.device=cuda"] * (config.data.device == "cuda")
    left_out += ["train.cuda_graph=auto"] * (config.train.cuda_graph == "auto")
    changed = replace(
        config,
        device="cpu",
        precision="auto" if config.precision == "fp16" else config.precision,
        distributed=replace(config.distributed, backend="auto"),
        data=replace(config.data, device="cpu", num_workers=0),
        train=replace(config.train, cuda_graph="off"),
    )
    return changed, ", ".join(left_out)


@contextmanager
def pretend(config: Config, world_size: int) -> Iterator[DistributedContext]:
    """Be rank 0 of ``world_size`` that do not exist, for the length of a ``with`` block."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    env, device = DistributedEnvironment(world_size=world_size), torch.device("cpu")
    set_threads(config.distributed.threads)
    store = HashStore()
    store.set(host_key(0), "0 this-machine")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        precision = resolve_precision(config.precision, device)
        watchdog = Watchdog(store, env, config.distributed.init_timeout_s, None)
        yield DistributedContext(env, device, "fake", precision, watchdog, RankLog(env, device))
    finally:
        dist.destroy_process_group()


def in_words(trainer: Trainer, checkpoint: int, started_with: int, data: int) -> list[tuple[str, str]]:
    """Write the plan of a trainer that was composed."""
    config, sampler, reduction = trainer.config, trainer.feed.sampler, trainer.reduction
    share, ranks = len(sampler.mine), trainer.env.world_size
    last = sampler.count(sampler.steps - 1)
    left = sampler.samples - sampler.steps * sampler.global_batch
    ends = f"drops {left:,} images" if left > 0 else f"ends with a batch of {last:,}; drops none"
    shards = f", {config.distributed.virtual_shards} virtual shards" * (config.distributed.reduction == "exact")
    epochs = f"{trainer.total_steps / sampler.steps:g} epochs of {sampler.steps:,}"
    kept = config.checkpoint.keep_last + 1
    rows = [
        ("run", str(trainer.folder)),
        ("ranks", f"{ranks:,}: {config.distributed.reduction} reduction{shards}"),
        ("data", f"{config.data.name}: {sampler.samples:,} images to train on, {trainer.feed.test_count:,} to test"),
        ("global batch", f"{sampler.global_batch:,} images = {_shares(sampler.global_batch, share, ranks)}"),
        ("micro-batches", f"{reduction.micro_batches_per_rank} a step, of up to {reduction.micro_batch_size:,} images"),
        ("steps", f"{trainer.total_steps:,} ({epochs}); each epoch {ends}"),
        ("test", f"{-(-trainer.feed.test_count // ranks):,} images a rank or so, after each epoch"),
        ("checkpoint", f"{_size(checkpoint)}, {_size(checkpoint * kept)} for the {kept} that are kept"),
        ("memory of a rank", f"about {_size(sum(size for _, size in memory(trainer)))} of its own:"),
    ]
    rows += [(f"  {name}", _size(size)) for name, size in memory(trainer)]
    rows.append(("beside that", f"images {_size(data)}, once per node; on a GPU that keeps them, once per GPU"))
    rows.append(("", f"PyTorch itself {_size(started_with)} on this machine"))
    return rows


def memory(trainer: Trainer) -> list[tuple[str, int]]:
    """Return what a rank keeps in memory for training: (what, bytes)."""
    weights = sum(p.nbytes for p in trainer.net.parameters())
    states = trainer.take_step.optimizer.state.values()
    of_optimizer = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
    elements = sum(p.numel() for p in trainer.net.parameters())
    exact = trainer.config.distributed.reduction == "exact"
    rows = [("weights", weights), ("gradients", weights), ("optimizer", of_optimizer)]
    rows += [("exact sums", 2 * 8 * elements)] * exact
    share = len(trainer.feed.sampler.mine)
    rows.append(("batch", share * SIZE * SIZE * (1 + 4)))  # as bytes, and as float32
    return [*rows, ("activations", activations(trainer.config, trainer.reduction.micro_batch_size))]


def activations(config: Config, images: int) -> int:
    """Return the bytes that forward keeps for backward on a micro-batch, in float32; none are allocated for it."""
    meta = torch.device("meta")
    net = make_model(config.model.name, config.model.channels_last, meta)
    known = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    inputs = torch.empty(images, 1, SIZE, SIZE, device=meta)
    labels = torch.empty(images, dtype=torch.int64, device=meta)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(net(inputs), labels)
        total = sum(kept.values())
    del loss  # until here: the addresses of what is freed come again
    return total


def _shares(batch: int, share: int, ranks: int) -> str:
    even = batch == share * ranks
    return f"ranks {ranks:,} × {share:,}" if even else f"{ranks:,} ranks with up to {share:,} each"


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
