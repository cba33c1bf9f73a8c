"""Requests for the samples of a batch, and the dataset that answers them, in a rank or in a loader worker."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distlenet.data.seeding import EVALUATION_EPOCH, load_samples
from distlenet.data.sources import ImageDataset
from distlenet.task import Batch, BatchDataset, Data, MapDataset, SampleKeys
from distlenet.utils.nested import count_samples, map_tensors, tensors_in


class TransformedDataset:
    """The samples of a dataset on a GPU, as ``Task.transform`` returned them."""

    def __init__(self, data: Data) -> None:
        """Take nested tensors, whose first dimension is the sample."""
        self.data, self.samples = data, count_samples(data)
        self.device = next(tensors_in(data)).device

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples

    def get_batch(self, indices: Tensor) -> Data:
        """Return the samples at ``indices``, int64 (n,) on the device."""
        return map_tensors(lambda tensor: tensor.index_select(0, indices), self.data)


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

    def __reduce__(self) -> tuple[Callable[..., "Fetched"], tuple[Data, np.ndarray]]:
        """Return from a worker, which has no GPU, with the indices by value: a file in shared memory costs more."""
        return _fetched_on_host, (self.data, self.indices.numpy())


def _fetched_on_host(data: Data, array: np.ndarray) -> Fetched:
    indices = torch.from_numpy(array)
    return Fetched(data, indices, indices)


class Request(NamedTuple):
    """The samples to load in one batch. A loader worker receives nothing else."""

    epoch: int  # or EVALUATION_EPOCH
    indices: Tensor  # int64 (n,), on the host; n may be 0

    def __reduce__(self) -> tuple[Callable[..., "Request"], tuple[int, np.ndarray]]:
        """Send the indices to a worker by value.

        The indices of an epoch are views of one tensor, which torch would move to shared memory while several threads,
        one per worker, send its views.
        """
        return _request, (self.epoch, self.indices.numpy())


def _request(epoch: int, array: np.ndarray) -> Request:
    return Request(epoch, torch.from_numpy(array))


class BatchedDataset(Dataset[Fetched]):
    """A dataset whose item is a whole batch, on the GPU if an ``ImageDataset`` was placed there."""

    def __init__(self, dataset: AnyDataset, collate: Collate, seed: int, partners: bool = False) -> None:
        """Load ``partners``, too: as ``Task.partners``."""
        self.dataset, self.collate, self.seed, self.partners = dataset, collate, seed, partners
        placed = isinstance(dataset, ImageDataset | TransformedDataset)
        self.device = dataset.device if placed else torch.device("cpu")  # type: ignore[union-attr]
        self.transformed = isinstance(dataset, TransformedDataset)

    def __getitem__(self, request: Request) -> Fetched:
        """Fetch the samples of a request. No host sync."""
        epoch, indices = request
        on_device = indices if self.device.type == "cpu" else indices.pin_memory().to(self.device, non_blocking=True)
        keys = SampleKeys(self.seed, epoch, on_device)
        return Fetched(self.fetch(keys), indices, on_device)

    def fetch(self, keys: SampleKeys) -> Data:
        """Return the samples at ``keys.indices``, with their partners. A CUDA graph can capture it on the GPU."""
        data = self._fetch(keys)
        if self.partners:
            data = data, self._fetch(replace(keys, indices=keys.integers("partner", len(self.dataset))))
        return data

    def _fetch(self, keys: SampleKeys) -> Data:
        if not len(keys.indices):  # no dataset has to serve a batch without samples
            return ()
        if hasattr(self.dataset, "get_batch"):
            return self.dataset.get_batch(keys.indices)
        return self.collate(load_samples(self.dataset, keys))


def read_samples(dataset: AnyDataset, collate: Collate, seed: int, indices: Tensor) -> Data:
    """Return the samples at ``indices``, int64 (n,), as an evaluation reads them."""
    return BatchedDataset(dataset, collate, seed)[Request(EVALUATION_EPOCH, indices)].data


@dataclass(frozen=True)
class ResidentBatch:
    """One rank's share of a global batch of a dataset on the GPU, not gathered yet."""

    dataset: BatchedDataset
    indices: Tensor  # int64 (n,), on the host
    epoch: int
    number: int
    global_size: int

    def __len__(self) -> int:
        """Return n, the samples of this rank."""
        return self.indices.numel()

    def gather(self, keys: SampleKeys) -> Batch:
        """Return the batch; ``keys`` has the indices on the GPU. No host sync."""
        data = self.dataset.fetch(keys)
        return Batch(data, self.indices, keys, self.epoch, self.number, self.global_size, self.dataset.transformed)
