import ctypes
import multiprocessing
import signal
import time
from itertools import chain
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from conftest import LIMIT_S
from hypothesis import given
from hypothesis import strategies as st
from loaders import make_evaluation_loader, make_loader
from torch.utils.data import Dataset, get_worker_info

from distlenet.config.schema import Config
from distlenet.data.batched_dataset import Fetched, Request
from distlenet.data.placement import place_datasets
from distlenet.data.sources import ImageDataset
from distlenet.task import Datasets, Task
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def dataset_of(samples: int) -> ImageDataset:
    return ImageDataset(torch.arange(samples, dtype=torch.uint8).view(samples, 1, 1), torch.arange(samples))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_fetches_the_batches_of_the_sampler(num_workers):
    dataset = dataset_of(21)
    loader = make_loader(dataset, 5, rank=1, world_size=2, num_workers=num_workers)
    for epoch, start in ((0, 0), (1, 3)):
        batches = list(loader.epoch(epoch, start))
        expected = list(loader.sampler.batches(epoch, start))
        assert [batch.indices.tolist() for batch in batches] == [indices.tolist() for indices in expected]
        for batch, indices in zip(batches, expected, strict=True):
            if not len(indices):
                assert batch.data == ()
                continue
            assert batch.data[0].flatten().tolist() == batch.data[1].tolist() == indices.tolist()
        assert [batch.number for batch in batches] == list(range(start, 5))
        assert [batch.global_size for batch in batches] == [5, 5, 5, 5, 1][start:]
        assert {batch.epoch for batch in batches} == {epoch}
    assert [len(batch) for batch in batches] == [2, 0]  # of the last batch this rank has no sample


def test_indices_reach_and_leave_a_worker_by_value():
    """Views of one tensor must not move to shared memory while several threads send them."""
    indices, _ = torch.arange(10).split(5)
    for sent in (Request(3, indices), Fetched((), indices, indices)):
        received = ForkingPickler.loads(ForkingPickler.dumps(sent))
        assert received.indices.tolist() == indices.tolist()
        assert not indices.is_shared()
        assert not received.indices.is_shared()


def test_one_batch_is_loaded_again():
    loader = make_loader(dataset_of(20), 5)
    first, again = list(loader.epoch(1))[2], loader.batch(1, 2)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.data[0], again.data[0])
    assert (again.epoch, again.number, again.global_size) == (1, 2, 5)


def test_an_epoch_can_stop_early():
    loader = make_loader(dataset_of(20), 5)
    whole, part = list(loader.epoch(1)), list(loader.epoch(1, start=1, stop=3))
    assert [batch.number for batch in part] == [1, 2]
    assert [batch.indices.tolist() for batch in part] == [batch.indices.tolist() for batch in whole[1:3]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keys_hold_seed_epoch_and_indices(num_workers):
    for batch in make_loader(dataset_of(12), 5, num_workers=num_workers).epoch(2):
        assert (batch.keys.seed, batch.keys.epoch) == (3, 2)
        assert batch.keys.indices.tolist() == batch.indices.tolist()


def test_a_sample_batch_is_the_first_sample():
    batch = make_loader(dataset_of(20), 5).sample_batch()
    images, labels = batch.data
    assert (len(batch), images.shape, labels.tolist()) == (1, (1, 1, 1), [0])
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


def test_data_is_on_the_device_and_indices_are_also_on_the_host():
    """The device "meta" stands for a GPU: it copies no values."""
    loader = make_loader(dataset_of(20), 5, device=torch.device("meta"))
    batch, on_host = loader.batch(0, 1), make_loader(dataset_of(20), 5).batch(0, 1)
    devices = {tensor.device.type for tensor in (*batch.data, *loader.sample_batch().data, batch.keys.indices)}
    assert devices == {"meta"}
    assert batch.indices.tolist() == on_host.indices.tolist()


class Sentences:
    """A dataset of other data: word numbers, of another length in each sample, and a score."""

    def __len__(self):
        return 12

    def get_batch(self, indices):
        return {"words": [torch.arange(index) for index in indices.tolist()], "score": indices / 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_nested_data_is_loaded(num_workers):
    batches = list(make_loader(Sentences(), 5, num_workers=num_workers).epoch(0))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for batch in batches:
        assert [len(words) for words in batch.data["words"]] == batch.indices.tolist()
        assert torch.equal(batch.data["score"], batch.indices / 2)


class Squares:
    """A map-style dataset."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, [index] * index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_of_a_map_style_dataset_are_collated(num_workers):
    def collate(samples):
        return {"ragged": [x for _, x in samples]}

    loader = make_loader(Squares(), 5, num_workers=num_workers, collate=collate)
    batches = list(loader.epoch(0))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    for batch in batches:
        assert batch.data == {"ragged": [[index] * index for index in batch.indices.tolist()]}


class SmallTask(Task):
    def model(self):
        raise NotImplementedError

    datasets = loss = model


class Pairs(Squares):
    def __getitem__(self, index: int):
        return torch.tensor(index), {"name": str(index), "pair": (index, float(index))}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pairs_arrive_as_tuples(num_workers):
    """The engine takes a list for one item per sample; torch makes lists of tuples in three places."""
    collate = SmallTask(Config()).collate
    batch = next(make_loader(Pairs(), 5, num_workers=num_workers, collate=collate).epoch(0))
    numbers, parts = batch.data
    assert isinstance(batch.data, tuple)
    assert isinstance(parts["pair"], tuple)
    assert parts["name"] == [str(index) for index in batch.indices.tolist()]
    assert numbers.tolist() == parts["pair"][0].tolist() == batch.indices.tolist()


def test_a_loader_does_not_use_the_global_generator():
    before = torch.get_rng_state()
    assert len(list(make_loader(dataset_of(20), 5).epoch(0))) == 4
    assert torch.equal(torch.get_rng_state(), before)


@given(st.integers(0, 250), st.integers(1, 50), st.integers(1, 9))
def test_evaluation_has_every_sample_once_in_chunks_that_do_not_depend_on_ranks(samples, chunk, world_size):
    dataset = dataset_of(samples)
    ranks = [make_evaluation_loader(dataset, chunk, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches, one_rank = list(chain.from_iterable(ranks)), list(make_evaluation_loader(dataset, chunk))
    chunks = [batch.indices.tolist() for batch in one_rank]
    assert sorted(batch.indices.tolist() for batch in batches) == chunks
    assert [index for indices in chunks for index in indices] == list(range(samples))
    assert [batch.data[1].tolist() for batch in one_rank] == chunks
    assert all(batch.keys is None for batch in batches)


@pytest.mark.parametrize(("samples", "expected"), [(22, 2), (8, 0), (9, 1), (24, 2), (25, 2)])
def test_evaluation_counts_the_batches_that_every_rank_has(samples, expected):
    loaders = [make_evaluation_loader(dataset_of(samples), 4, rank=rank, world_size=3) for rank in range(3)]
    assert {loader.batches_of_every_rank for loader in loaders} == {expected}
    assert min(len(list(loader)) for loader in loaders) == expected


def test_images_stay_on_the_host_without_a_gpu():
    datasets = Datasets(dataset_of(4), dataset_of(2), source="generated")
    assert place_datasets(datasets, "auto", 0, CPU) is datasets
    assert place_datasets(datasets, "cpu", 2, CPU) is datasets
    with pytest.raises(UserError, match=r"data\.device=cuda: this rank has no GPU"):
        place_datasets(datasets, "cuda", 0, CPU)
    with pytest.raises(UserError, match=r"data\.device=cuda: data\.num_workers=2: they have no GPU"):
        place_datasets(datasets, "cuda", 2, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"data\.device=cuda: these data sets are not images in memory"):
        place_datasets(Datasets([1, 2], [3]), "cuda", 0, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("samples", "num_workers", "shapes"),
    [
        ([torch.ones(9), torch.ones(1)], 0, ", such as [1] and [9]"),
        ([np.ones((2, 3)), np.ones((2, 4))], 0, ", such as [2, 3] and [2, 4]"),
        ([[1, 2], [1]], 0, ""),
        (
            [torch.ones(9), torch.ones(1)],
            1,
            ", such as [1] and [9]",
        ),  # in a loader process, torch stacks into a buffer; one of these two
        (
            [torch.ones(1), torch.ones(9)],
            1,
            ", such as [1] and [9]",
        ),  # batches has the longest sample first, which does not fit into it
    ],
)
def test_samples_of_different_shapes_are_a_message_of_one_line(samples, num_workers, shapes):
    dataset = [(sample, 0) for sample in samples]
    task = type("Mine", (Task,), {"model": None, "loss": None, "datasets": None})(Config())
    with pytest.raises(UserError) as error:
        next(make_loader(dataset, 2, num_workers=num_workers, collate=task.collate).epoch(0))
    assert str(error.value) == (
        f"Mine.collate: samples have different shapes{shapes}, which the default cannot combine; define Mine.collate, "
        "which returns a list of tensors; see docs/own.md"
    )


class HoldsTheInterpreter(Dataset):
    """In one worker, a call of C that does not release the GIL: no thread of the worker handles a signal."""

    def __init__(self, started):
        self.started = started

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if get_worker_info().id == 1:
            self.started.touch()
            ctypes.PyDLL(None).sleep(1000)
        return index


@pytest.mark.slow
def test_a_worker_that_does_not_respond_is_killed(tmp_path):
    loader = make_loader(HoldsTheInterpreter(tmp_path / "started"), 2, num_workers=2)
    next(loader.epoch(0))
    workers, deadline = multiprocessing.active_children(), time.monotonic() + LIMIT_S
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    loader.close()
    assert sorted(worker.exitcode for worker in workers) == [-signal.SIGKILL, 0]
