"""Loaders with the usual arguments."""

import torch
from torch.utils.data import default_collate

from distlenet.data.loader import EvaluationLoader, Loader
from distlenet.data.sampler import GlobalBatchSampler

CPU = torch.device("cpu")


def make_loader(
    dataset,
    batch_size,
    *,
    rank=0,
    world_size=1,
    seed=3,
    num_workers=0,
    device=CPU,
    collate=default_collate,
    partners=False,
):
    """Load a rank's share of the global batches of ``batch_size`` samples; the last one is shorter."""
    sampler = GlobalBatchSampler(dataset, batch_size, rank, world_size, seed, drop_last=False, virtual_shards=None)
    return Loader(dataset, sampler, num_workers, device, collate, partners)


def make_evaluation_loader(dataset, chunk, *, rank=0, world_size=1, seed=0, device=CPU):
    """Load a rank's chunks of ``chunk`` samples."""
    return EvaluationLoader(dataset, chunk, rank, world_size, device, default_collate, seed)
