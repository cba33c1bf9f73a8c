"""Requests for the samples of a batch, and the dataset that answers them, in a rank or in a loader worker."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distlenet.data.seeding import EVALUATION_EPOCH, load_samples
from distlenet.data.sources import ImageDataset
from distlenet.task import BatchDataset, Data, MapDataset, SampleKeys
from distlenet.utils.nested import map_tensors

AnyDataset = MapDataset | BatchDataset

Collate = Callable[[list[Any]], Data]
"""Combines the samples of a map-style dataset."""


@dataclass(frozen=True)
class Fetched:
    """The samples of a request. A DataLoader converts tuples to lists, but does not change a class like this."""

    data: Data
    indices: Tensor  # int64 (n,), on the host
    on_device: Tensor  # the same, on the device of the samples

    def pin_memory(self) -> "Fetched":
        """Return a copy in pinned memory; the DataLoader calls this."""
        return Fetched(*map_tensors(lambda tensor: tensor.pin_memory(), (self.data, self.indices, self.on_device)))


class Request(NamedTuple):
    """The samples to load in one batch. A loader worker receives nothing else."""

    epoch: int  # or EVALUATION_EPOCH
    indices: Tensor  # int64 (n,), on the host; n may be 0


class BatchedDataset(Dataset[Fetched]):
    """A dataset whose item is a whole batch, on the GPU if an ``ImageDataset`` was placed there."""

    def __init__(self, dataset: AnyDataset, collate: Collate, seed: int, partners: bool = False) -> None:
        """Load ``partners``, too: as ``Task.partners``."""
        self.dataset, self.collate, self.seed, self.partners = dataset, collate, seed, partners
        self.device = dataset.images.device if isinstance(dataset, ImageDataset) else torch.device("cpu")

    def __getitem__(self, request: Request) -> Fetched:
        """Fetch the samples of a request. No host sync."""
        epoch, indices = request
        on_device = indices if self.device.type == "cpu" else indices.pin_memory().to(self.device, non_blocking=True)
        keys = SampleKeys(self.seed, epoch, on_device)
        data = self._fetch(keys)
        if self.partners:
            data = data, self._fetch(replace(keys, indices=keys.integers("partner", len(self.dataset))))
        return Fetched(data, indices, on_device)

    def _fetch(self, keys: SampleKeys) -> Data:
        if not len(keys.indices):  # no dataset has to serve a batch without samples
            return ()
        if hasattr(self.dataset, "get_batch"):
            return self.dataset.get_batch(keys.indices)
        return self.collate(load_samples(self.dataset, keys))


def read_samples(dataset: AnyDataset, collate: Collate, seed: int, indices: Tensor) -> Data:
    """Return the samples at ``indices``, int64 (n,), as an evaluation reads them."""
    return BatchedDataset(dataset, collate, seed)[Request(EVALUATION_EPOCH, indices)].data
