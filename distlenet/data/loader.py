"""Batches for one rank, on its device."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from distlenet.config.schema import Config
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.data.seeding import EVALUATION_EPOCH, load_samples
from distlenet.data.sources import ImageDataset
from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import block_signals, worker_init_fn
from distlenet.task import Batch, BatchDataset, Data, Datasets, MapDataset, SampleKeys, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors, tensors_in

GPU_SHARE = 0.25  # of a GPU's free memory, which a dataset may take to be kept there with data.device=auto

AnyDataset = MapDataset | BatchDataset

Collate = Callable[[list[Any]], Data]
"""Combines the samples of a map-style dataset."""


@dataclass(frozen=True)
class Fetched:
    """What was loaded for a request. A DataLoader turns tuples into lists, but leaves a class like this as it is."""

    data: Data
    indices: Tensor  # int64 (n,), on the host
    on_device: Tensor  # the same, on the device of the samples

    def pin_memory(self) -> "Fetched":
        """Return a copy in pinned memory; the DataLoader calls this."""
        return Fetched(*map_tensors(lambda tensor: tensor.pin_memory(), (self.data, self.indices, self.on_device)))


class Request(NamedTuple):
    """The samples to load in one batch: all that a loader worker receives."""

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


class _EpochSampler(Sampler[Request]):
    """Hands a DataLoader the requests of one epoch: persistent workers need one DataLoader for all epochs."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class Loader:
    """Load a rank's share of the global batches, in any epoch and from any batch on."""

    def __init__(
        self,
        dataset: AnyDataset,
        sampler: GlobalBatchSampler,
        num_workers: int,
        device: torch.device,
        collate: Collate = default_collate,
        partners: bool = False,
    ) -> None:
        self.sampler, self.device = sampler, device
        self.batched = BatchedDataset(dataset, collate, sampler.seed, partners)
        self.copies = device != self.batched.device
        self.epoch_sampler = _EpochSampler()
        self.loader = DataLoader(
            self.batched,
            batch_size=None,  # no batching by the DataLoader: the requests reach the dataset whole
            sampler=self.epoch_sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self.copies,
            worker_init_fn=worker_init_fn,
            generator=torch.Generator(),  # the loader draws a seed per epoch: not from the global generator
        )

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield the global batches ``start`` to ``stop`` - 1 of an epoch; the first call starts the workers."""
        batches = self.sampler.batches(epoch, start, stop)
        self.epoch_sampler.requests = (Request(epoch, indices) for indices in batches)
        with block_signals():  # a signal to stop must not end a worker while it starts
            fetched: Iterator[Fetched] = iter(self.loader)
        if self.copies:
            fetched = prefetch_to_device(fetched, self.device)
        for number, samples in enumerate(fetched, start):
            yield self._batch(samples, epoch, number)

    def batch(self, epoch: int, number: int) -> Batch:
        """Load one global batch, without the workers."""
        (indices,) = self.sampler.batches(epoch, number, number + 1)
        return self._batch(self.batched[Request(epoch, indices)], epoch, number)

    def sample_batch(self) -> Batch:
        """Return a batch of one sample, the first of the dataset: an example of the data."""
        return self._batch(self.batched[Request(0, torch.zeros(1, dtype=torch.int64))], 0, 0)

    def _batch(self, fetched: Fetched, epoch: int, number: int) -> Batch:
        data, indices, on_device = fetched.data, fetched.indices, fetched.on_device
        if self.copies:  # does nothing for what was prefetched
            data, on_device = map_tensors(lambda tensor: tensor.to(self.device), (data, on_device))
        keys = SampleKeys(self.sampler.seed, epoch, on_device)
        return Batch(data, indices, keys, epoch, number, self.sampler.global_size(number))


class EvaluationLoader:
    """Load a rank's share of a set: every sample once, without padding.

    Chunk k, of ``chunk`` consecutive samples, belongs to rank k % W. Which samples are computed together does
    therefore not depend on W. The last chunk is shorter; a rank may have no chunk.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        chunk: int,
        rank: int,
        world_size: int,
        device: torch.device,
        collate: Collate = default_collate,
        seed: int = 0,
    ) -> None:
        self.batched, self.device = BatchedDataset(dataset, collate, seed), device
        self.samples, self.chunk, self.rank, self.world_size = len(dataset), chunk, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        starts = range(self.rank * self.chunk, self.samples, self.world_size * self.chunk)
        chunks = (torch.arange(start, min(start + self.chunk, self.samples)) for start in starts)
        fetched: Iterator[Fetched] = (self.batched[Request(EVALUATION_EPOCH, indices)] for indices in chunks)
        if self.device != self.batched.device:
            fetched = prefetch_to_device((samples.pin_memory() for samples in fetched), self.device)
        for number, samples in enumerate(fetched):
            yield Batch(samples.data, samples.indices, None, 0, number, len(samples.indices))

    @property
    def batches_of_every_rank(self) -> int:
        """The smallest number of batches of a rank."""
        return -(-self.samples // self.chunk) // self.world_size


def make_loaders(
    config: Config, context: DistributedContext, datasets: Datasets, task: Task
) -> tuple[Loader, dict[str, EvaluationLoader]]:
    """Make the loaders of a rank: for training, and ``evaluation_loaders``. A collective.

    Raise UserError if the datasets do not fit into the memory that ``data.device`` names.
    """
    env, device, num_workers = context.env, context.device, config.data.num_workers
    shards = config.distributed.virtual_shards if config.distributed.reduction == "exact" else None
    batch_size, drop_last = config.train.global_batch_size, config.data.drop_last
    sampler = GlobalBatchSampler(
        datasets.train, batch_size, env.rank, env.world_size, config.seed, drop_last, virtual_shards=shards
    )
    with raise_on_all_ranks():  # a GPU may have less free memory than the others
        datasets = place_datasets(datasets, config.data.device, num_workers, device)
    loader = Loader(datasets.train, sampler, num_workers, device, task.collate, task.partners)
    return loader, evaluation_loaders(config, context, datasets, task)


def evaluation_loaders(
    config: Config, context: DistributedContext, datasets: Datasets, task: Task
) -> dict[str, EvaluationLoader]:
    """Make a rank's loaders of the validation set, if there is one, and of the test set: ``val``, then ``test``."""
    env, device = context.env, context.device
    return {
        split: EvaluationLoader(
            dataset, task.eval_batch_size, env.rank, env.world_size, device, task.collate, config.seed
        )
        for split, dataset in (("val", datasets.validation), ("test", datasets.test))
        if dataset is not None
    }


def prefetch_to_device(batches: Iterator[Fetched], device: torch.device) -> Iterator[Fetched]:
    """Copy each batch to a GPU while the previous one is computed, on a separate stream.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
    """
    copy_stream, compute_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    in_flight: deque[tuple[Fetched, torch.cuda.Event]] = deque()

    def wait(fetched: Fetched, copied: torch.cuda.Event) -> Fetched:
        compute_stream.wait_event(copied)
        for tensor in tensors_in((fetched.data, fetched.on_device)):
            tensor.record_stream(compute_stream)  # its memory is not reused before that stream is done with it
        return fetched

    for batch in batches:
        with torch.cuda.stream(copy_stream):
            source = batch.data, batch.indices
            data, on_device = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), source)
            in_flight.append((Fetched(data, batch.indices, on_device), copy_stream.record_event()))
        if len(in_flight) == 2:
            yield wait(*in_flight.popleft())
    while in_flight:
        yield wait(*in_flight.popleft())


def place_datasets(datasets: Datasets, wanted: str, num_workers: int, device: torch.device) -> Datasets:
    """Return ``datasets`` with their images on the GPU, if one is used and they fit, else unchanged.

    ``wanted`` is auto, cpu or cuda. Raise UserError if it is cuda and the images cannot be there.
    """
    if wanted == "cuda" and num_workers:
        raise UserError(f"data.device=cuda: data.num_workers={num_workers}: they have no GPU; give data.num_workers=0")
    if wanted == "cuda" and device.type != "cuda":
        raise UserError("data.device=cuda: this rank has no GPU; give data.device=auto")
    if wanted == "cpu" or device.type == "cpu" or num_workers:
        return datasets
    splits = {split: getattr(datasets, split) for split in ("train", "validation", "test")}
    images = {split: dataset for split, dataset in splits.items() if isinstance(dataset, ImageDataset)}
    if len(images) < len([dataset for dataset in splits.values() if dataset is not None]):
        return datasets
    needed, free = sum(dataset.nbytes for dataset in images.values()), torch.cuda.mem_get_info(device)[0]
    if needed <= free * (1 if wanted == "cuda" else GPU_SHARE):
        placed: dict[str, Any] = {split: dataset.to(device) for split, dataset in images.items()}
        return replace(datasets, **placed)
    if wanted == "cuda":
        raise UserError(f"data.device=cuda: the images take {needed:,} bytes of {free:,} free; give data.device=auto")
    return datasets
