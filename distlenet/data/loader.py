"""Batches for one rank, on its device."""

from collections.abc import Iterator
from threading import Timer
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from distlenet.config.schema import Config
from distlenet.config.virtual_shards import virtual_shards
from distlenet.data.batched_dataset import AnyDataset, BatchedDataset, Collate, Fetched, Request, ResidentBatch
from distlenet.data.placement import place_datasets, prefetch_to_device, transform_once
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.data.seeding import EVALUATION_EPOCH
from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import block_signals, worker_init_fn
from distlenet.task import Batch, Datasets, SampleKeys, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors

WORKERS_EXIT_S = 5.0
"""For all workers together."""


class _EpochSampler(Sampler[Request]):
    """Hands a DataLoader the requests of one epoch: persistent workers need one DataLoader for all epochs."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class _UserErrorsAsItems(Dataset[Fetched | UserError]):
    """Returns a UserError instead of raising it: a DataLoader would put the traceback of the worker before its text."""

    def __init__(self, batched: BatchedDataset) -> None:
        self.batched = batched

    def __getitem__(self, request: Request) -> Fetched | UserError:
        try:
            return self.batched[request]
        except UserError as error:
            return error


def _raise_user_error(item: Fetched | UserError) -> Fetched:
    if isinstance(item, UserError):
        raise item
    return item


class Loader:
    """Load a rank's share of the global batches, in any epoch and from any batch on."""

    def __init__(
        self,
        dataset: AnyDataset,
        sampler: GlobalBatchSampler,
        num_workers: int,
        device: torch.device,
        collate: Collate,
        partners: bool,
    ) -> None:
        self.sampler, self.device = sampler, device
        self.batched = BatchedDataset(dataset, collate, sampler.seed, partners)
        self.copies = device != self.batched.device
        self.epoch_sampler = _EpochSampler()
        self.workers: DataLoader[Fetched | UserError] | None = None
        if num_workers:
            self.workers = DataLoader(
                _UserErrorsAsItems(self.batched),
                batch_size=None,  # no batching by the DataLoader: the requests reach the dataset whole
                sampler=self.epoch_sampler,
                num_workers=num_workers,
                persistent_workers=True,
                pin_memory=self.copies,
                worker_init_fn=worker_init_fn,
                generator=torch.Generator(),  # the loader draws a seed per epoch: not from the global generator
            )

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Batch | ResidentBatch]:
        """Yield the global batches ``start`` to ``stop`` - 1 of an epoch; the first call starts the workers."""
        batches = self.sampler.batches(epoch, start, stop)
        if self.batched.device.type == "cuda":
            for number, indices in enumerate(batches, start):
                yield ResidentBatch(self.batched, indices, epoch, number, self.sampler.global_size(number))
            return
        fetched = self._fetch(Request(epoch, indices) for indices in batches)
        if self.copies:
            fetched = prefetch_to_device(fetched, self.device)
        for number, samples in enumerate(fetched, start):
            yield self._batch(samples, epoch, number)

    def _fetch(self, requests: Iterator[Request]) -> Iterator[Fetched]:
        """Fetch the samples in the workers, or in this process; in pinned memory for a GPU."""
        if self.workers is not None:
            self.epoch_sampler.requests = requests
            with block_signals():  # a signal to stop must not end a worker while it starts
                return map(_raise_user_error, self.workers)
        fetched = map(self.batched.__getitem__, requests)
        return (samples.pin_memory() for samples in fetched) if self.copies else fetched

    def batch(self, epoch: int, number: int) -> Batch:
        """Load one global batch, without the workers."""
        (indices,) = self.sampler.batches(epoch, number, number + 1)
        return self._batch(self.batched[Request(epoch, indices)], epoch, number)

    def sample_batch(self) -> Batch:
        """Return a batch of one sample, the first of the dataset: an example of the data."""
        return self._batch(self.batched[Request(0, torch.zeros(1, dtype=torch.int64))], 0, 0)

    def close(self) -> None:
        """End the workers, and kill those that do not exit within ``WORKERS_EXIT_S``, such as one that reads a file.

        The garbage collector would close their queues before it asks them to exit, and then wait for each of them.
        """
        iterator: Any = None if self.workers is None else self.workers._iterator  # no public method does this
        if iterator is None:
            return

        def kill() -> None:
            # torch raises an exception for a worker that is killed
            signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
            iterator._worker_pids_set = False
            for worker in iterator._workers:
                worker.kill()

        timer = Timer(WORKERS_EXIT_S, kill)
        timer.start()
        iterator._shutdown_workers()
        timer.cancel()

    def _batch(self, fetched: Fetched, epoch: int, number: int) -> Batch:
        data, indices, on_device = fetched.data, fetched.indices, fetched.on_device
        if self.copies:  # does nothing for what was prefetched
            data, on_device = map_tensors(lambda tensor: tensor.to(self.device), (data, on_device))
        keys = SampleKeys(self.sampler.seed, epoch, on_device)
        global_size = self.sampler.global_size(number)
        return Batch(data, indices, keys, epoch, number, global_size, self.batched.transformed)


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
        collate: Collate,
        seed: int,
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
            size, transformed = len(samples.indices), self.batched.transformed
            yield Batch(samples.data, samples.indices, None, 0, number, size, transformed)

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
    shards = virtual_shards(config) if config.distributed.reduction == "exact" else None
    batch_size, drop_last = config.train.global_batch_size, config.data.drop_last
    sampler = GlobalBatchSampler(
        datasets.train, batch_size, env.rank, env.world_size, config.seed, drop_last, virtual_shards=shards
    )
    with raise_on_all_ranks():  # a GPU may have less free memory than the others
        datasets = transform_once(place_datasets(datasets, config.data.device, num_workers, device), task)
    loader = Loader(datasets.train, sampler, num_workers, device, task.collate, task.partners)
    return loader, evaluation_loaders(config, context, datasets, task)


def first_test_batch(config: Config, device: torch.device, datasets: Datasets, task: Task) -> Batch:
    """Return a batch of the first test sample: an example of the data in an evaluation."""
    return next(iter(EvaluationLoader(datasets.test, 1, 0, 1, device, task.collate, config.seed)))


def evaluation_loaders(
    config: Config, context: DistributedContext, datasets: Datasets, task: Task
) -> dict[str, EvaluationLoader]:
    """Make a rank's loaders of the validation set, if there is one, and of the test set: ``val``, then ``test``.

    Raise UserError if one of them is empty.
    """
    env, device = context.env, context.device
    for split, dataset in (("validation", datasets.validation), ("test", datasets.test)):
        if dataset is not None and not len(dataset):
            raise UserError(f"{type(task).__name__}.datasets: the {split} set has no samples; add at least one")
    return {
        split: EvaluationLoader(
            dataset, task.eval_batch_size, env.rank, env.world_size, device, task.collate, config.seed
        )
        for split, dataset in (("val", datasets.validation), ("test", datasets.test))
        if dataset is not None
    }
