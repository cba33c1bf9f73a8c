"""Batches for one rank: a sampler says which samples, one gather fetches them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distlenet.data.sources import Split
from distlenet.preemption import begin_worker, holding_signals

Batch = tuple[Tensor, Tensor, Tensor]
"""Images uint8 (n, H, W), labels int64 (n,), and the samples' indices int64 (n,)."""


class Gather(Dataset[Batch]):
    """A data set whose item is a whole batch: it is asked with a tensor of indices, not with one index."""

    def __init__(self, split: Split) -> None:
        """Serve the samples of ``split``."""
        self.split = split

    def __getitem__(self, indices: Tensor) -> Batch:
        """Fetch the samples at ``indices``, int64 (n,); n may be 0."""
        images, labels = (part.index_select(0, indices) for part in (self.split.images, self.split.labels))
        return images, labels.long(), indices


class Loader(DataLoader[Batch]):
    """A DataLoader whose worker processes no signal to stop ends: their rank stops when all ranks do."""

    def __iter__(self) -> Any:
        """Begin an epoch; the first one starts the workers."""
        with holding_signals():
            return super().__iter__()


def make_loader(split: Split, sampler: Iterable[Tensor], workers: int, device: torch.device) -> Loader:
    """Load what ``sampler`` names, a tensor of indices at a time.

    ``batch_size=None`` turns the DataLoader's own batching off: the sampler's tensors arrive at the data
    set whole (https://docs.pytorch.org/docs/stable/data.html#disable-automatic-batching).
    """
    return Loader(
        Gather(split),
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # the loader draws a seed per epoch: not from the global generator
    )
