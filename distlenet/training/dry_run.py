"""``train --dry-run --world-size N``: what each of N ranks would do, composed in this process alone.

The trainer of rank 0 is built as for a job, on the CPU and with torch's fake process group, whose collectives return
their input. So every check that training makes of settings, data and ranks is made, and no step is taken.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distlenet.checkpoint.archive import count_bytes
from distlenet.config.loading import run_directory, run_url
from distlenet.config.schema import Config
from distlenet.config.virtual_shards import virtual_shards
from distlenet.data.sources import ImageDataset, require_local_data
from distlenet.distributed.context import DistributedContext, set_threads
from distlenet.distributed.device import resolve_precision
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.preemption import Preemption
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.rendezvous import host_key
from distlenet.distributed.watchdog import Watchdog
from distlenet.reduction.batch_size import micro_batch_size
from distlenet.task import Data, new_model
from distlenet.tasks.registry import MakeTask, create_task, reads_images
from distlenet.tasks.registry import make_task as make_configured_task
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer
from distlenet.utils.nested import map_tensors, tensors_in

Row = tuple[str, str]


def plan(config: Config, world_size: int, make_task: MakeTask = make_configured_task) -> list[Row]:
    """Compose the job of ``world_size`` ranks, and return its plan as rows of (name, text).

    Raise UserError if training would, or if the dataset is not on this machine: nothing is downloaded.
    """
    micro_batch_size(config, world_size)  # before the data: it is the most frequent mistake
    if reads_images(config, make_task):
        require_local_data(config.data)
    config, not_checked = _for_this_machine(config)
    resident_before = _resident_bytes()
    with fake_process_group(config, world_size) as context:
        task = create_task(make_task, config)
        trainer = Trainer(config, context, task, run_directory(config), Trackers(), Preemption(0.0))
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.train_step.on_device.optimizer.step()  # creates its state; the changed model is discarded
        rows = _describe(trainer, count_bytes(trainer.state_dict()))
    evaluated = (loader.batched.dataset for loader in trainer.evaluator.loaders.values())
    datasets = (trainer.loader.batched.dataset, *evaluated)
    if images := sum(data.nbytes for data in datasets if isinstance(data, ImageDataset)):
        rows.append(("images", f"{_size(images)}, once per node; on a GPU that keeps them, once per GPU"))
    rows.append(("PyTorch itself", f" {_size(resident_before)} on this machine"))
    return [*rows, ("not checked here", not_checked)] if not_checked else rows


def _for_this_machine(config: Config) -> tuple[Config, str]:
    """Return settings that the CPU can compose, and the given ones that are not checked."""
    unchecked = {
        "device=cuda": config.device == "cuda",
        "precision=fp16": config.precision == "fp16",
        "distributed.backend=nccl": config.distributed.backend == "nccl",
        "data.device=cuda": config.data.device == "cuda",
        "model.compile=true": config.model.compile,
    }
    changed = replace(
        config,
        device="cpu",
        precision="auto" if config.precision == "fp16" else config.precision,
        distributed=replace(config.distributed, backend="auto"),
        data=replace(config.data, device="cpu", num_workers=0, build_cache=False),  # writes nothing
        model=replace(config.model, compile=False),
    )
    return changed, ", ".join(setting for setting, given in unchecked.items() if given)


@contextmanager
def fake_process_group(config: Config, world_size: int) -> Iterator[DistributedContext]:
    """Be rank 0 of ``world_size`` ranks that do not exist, within a ``with`` block."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    env, device = DistributedEnvironment(world_size=world_size), torch.device("cpu")
    set_threads(config.distributed.threads)
    store = HashStore()
    store.set(host_key(0), "0 this-machine")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        precision = resolve_precision(config.precision, device, bf16=True)
        watchdog = Watchdog(store, env, config.distributed.init_timeout_s, None, None)
        yield DistributedContext(env, device, "fake", precision, watchdog, RankLog(env, device))
    finally:
        dist.destroy_process_group()


def _describe(trainer: Trainer, checkpoint: int) -> list[Row]:
    """Return the plan of a composed trainer; ``checkpoint`` is the size of one in bytes."""
    config, sampler, reducer = trainer.config, trainer.sampler, trainer.reducer
    ranks = trainer.env.world_size
    batch, share = sampler.global_batch_size, len(sampler.rank_offsets)
    shares = f"ranks {ranks:,} × {share:,}" if batch == share * ranks else f"{ranks:,} ranks with up to {share:,} each"
    dropped = sampler.samples - sampler.steps * batch
    last = sampler.global_size(sampler.steps - 1)
    end = f"drops {dropped:,} samples" if dropped > 0 else f"ends with a batch of {last:,}; drops none"
    epochs = f"{trainer.total_steps / sampler.steps:g} epochs of {sampler.steps:,}"
    sets = {split: loader.samples for split, loader in trainer.evaluator.loaders.items()}
    kept, evaluated = config.checkpoint.keep_last + ("val" in sets), sum(sets.values())
    others = ", ".join(f"{count:,} to {'validate' if split == 'val' else split}" for split, count in sets.items())
    memory = _memory(trainer)
    data = config.data.name if reads_images(config) else config.task.name
    return [
        ("run", run_url(config) or str(trainer.run_dir)),
        ("ranks", f"{ranks:,}: {config.distributed.reduction} reduction{_shards(config)}"),
        ("data", f"{data}: {sampler.samples:,} samples to train on, {others}"),
        ("global batch", f"{batch:,} samples = {shares}"),
        ("micro-batches", f"{reducer.micro_batches_per_rank} a step, of up to {reducer.micro_batch_size:,} samples"),
        ("steps", f"{trainer.total_steps:,} ({epochs}); each epoch {end}"),
        (
            "validation, test" if "val" in sets else "test",
            f"about {-(-evaluated // ranks):,} samples a rank, each epoch",
        ),
        ("checkpoint", f"{_size(checkpoint)}, {_size(checkpoint * kept)} for the {kept} that are kept"),
        ("memory of a rank", f"{'about' if 'activations' in memory else 'at least'} {_size(sum(memory.values()))}:"),
        *((f"  {name}", _size(size)) for name, size in memory.items()),
        *([] if "activations" in memory else [("  activations", "unknown: the loss needs the values of its inputs")]),
    ]


def _shards(config: Config) -> str:
    if config.distributed.reduction != "exact":
        return ""
    shards, chosen = virtual_shards(config), " (auto)" * (config.distributed.virtual_shards == "auto")
    return f", {shards} virtual shard{'s' * (shards > 1)}{chosen}"


def _memory(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that a rank keeps for training."""
    weights = sum(p.nbytes for p in trainer.model.parameters())
    at_once = trainer.reducer.micro_batches_per_rank if trainer.config.model.sync_batchnorm else 1
    states = trainer.train_step.on_device.optimizer.state.values()
    memory = {"weights": weights, "gradients": weights * at_once}
    memory["optimizer"] = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
    if trainer.config.train.ema_decay is not None:
        memory["averages"] = weights
    if trainer.config.distributed.reduction == "exact":
        memory["exact sums"] = 8 * sum(p.numel() for p in trainer.model.parameters())
    stored = trainer.loader.sample_batch().data
    inputs = trainer.train_step.on_device.example
    per_sample = sum(tensor.nbytes for tensor in tensors_in((stored, inputs)))
    memory["batch"] = len(trainer.sampler.rank_offsets) * per_sample
    activations = _activations(trainer, inputs)
    return memory if activations is None else memory | {"activations": activations * at_once}


def _activations(trainer: Trainer, sample: Data) -> int | None:
    """Return the bytes that forward keeps for backward on a micro-batch, in float32; nothing is allocated.

    None if the loss needs the values of its inputs: here they have only shapes.
    """
    size = trainer.reducer.micro_batch_size
    data = map_tensors(lambda t: torch.empty(size, *t.shape[1:], dtype=t.dtype, device="meta"), sample)
    model = new_model(trainer.task).to("meta")
    saved: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # kept: the address of a released storage is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        try:
            trainer.task.loss(model, data)
        except RuntimeError:  # such as item() of a tensor without values; the loss has already run on a sample
            return None
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)


def _resident_bytes() -> int:
    """Return how much memory this process uses (proc(5): the second field of statm, in pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
