import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.data.sampler import GlobalBatchSampler, permutation
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def make_samplers(samples, batch_size, world_size, seed=0, drop_last=False, virtual_shards=None):
    return [
        GlobalBatchSampler(range(samples), batch_size, rank, world_size, seed, drop_last, virtual_shards)
        for rank in range(world_size)
    ]


def global_batches(samples, batch_size, world_size, epoch=0, start=0, stop=None, drop_last=False):
    """Return the samples of each step over all ranks, in the order of their positions."""
    samplers = make_samplers(samples, batch_size, world_size, drop_last=drop_last)
    steps = list(zip(*(sampler.batches(epoch, start, stop) for sampler in samplers), strict=True))
    merged = []
    for parts in steps:
        global_batch = torch.full((sum(len(part) for part in parts),), -1)
        for rank, part in enumerate(parts):
            global_batch[rank::world_size] = part
        merged.append(global_batch)
    return merged


def assert_equal(batches, expected):
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


sizes = st.tuples(st.integers(1, 1000), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8]))


@given(sizes, st.integers(0, 3), st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(size, epoch, drop_last):
    samples, per_rank, world_size = size
    batch_size = per_rank * world_size
    if drop_last and batch_size > samples:
        return
    one_rank = global_batches(samples, batch_size, 1, epoch=epoch, drop_last=drop_last)
    assert_equal(global_batches(samples, batch_size, world_size, epoch=epoch, drop_last=drop_last), one_rank)
    assert len(one_rank) == len(make_samplers(samples, batch_size, 1, drop_last=drop_last)[0])


@given(sizes, st.integers(0, 3))
def test_epoch_has_every_sample_once(size, epoch):
    samples, per_rank, world_size = size
    seen = torch.cat(global_batches(samples, per_rank * world_size, world_size, epoch=epoch))
    assert torch.equal(seen.sort().values, torch.arange(samples))


@given(sizes, st.integers(0, 30), st.integers(0, 30))
def test_part_of_an_epoch_equals_the_same_part_of_the_whole(size, start, length):
    samples, per_rank, world_size = size
    whole = global_batches(samples, per_rank * world_size, world_size)
    stop = start + length
    part = global_batches(samples, per_rank * world_size, world_size, start=start, stop=stop)
    assert_equal(part, whole[start:stop])
    assert_equal(global_batches(samples, per_rank * world_size, world_size, start=start), whole[start:])


@given(st.integers(1, 300), st.sampled_from([(8, 3), (6, 4), (12, 5), (4, 4)]))
def test_samples_of_a_virtual_shard_stay_on_one_rank(samples, sizes):
    """Position p belongs to shard p % V, and shard s to rank s % W, also if W does not divide V."""
    shards, world_size = sizes
    batch_size = 2 * shards
    (one_rank,) = make_samplers(samples, batch_size, 1)
    samplers = make_samplers(samples, batch_size, world_size, virtual_shards=shards)
    for global_batch, *parts in zip(one_rank.batches(0), *(sampler.batches(0) for sampler in samplers), strict=True):
        position = torch.arange(len(global_batch))
        for rank, part in enumerate(parts):
            assert torch.equal(part, global_batch[position % shards % world_size == rank])


def test_batches_are_full_except_for_the_last():
    (sampler,), (dropping,) = make_samplers(10, 4, 1), make_samplers(10, 4, 1, drop_last=True)
    assert [len(part) for part in sampler] == [4, 4, 2] == [sampler.global_size(number) for number in range(3)]
    assert [len(part) for part in dropping] == [4, 4]


def test_rank_may_have_no_sample_of_the_last_batch():
    samplers = make_samplers(9, 4, 4)
    assert [[len(part) for part in sampler] for sampler in samplers] == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]


def test_iteration_follows_set_epoch_as_in_torch():
    (sampler,) = make_samplers(10, 4, 1)
    sampler.set_epoch(3)
    assert_equal(list(sampler), list(sampler.batches(3)))


def order(samples, seed, epoch):
    return permutation(samples, seed, epoch)(torch.arange(samples)).tolist()


def test_seeds_and_epochs_do_not_share_orders():
    """DistributedSampler adds them: its epoch 1 of seed 0 equals epoch 0 of seed 1."""
    orders = {tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_stable():
    """A change of this order changes the result of every run: it must be intended."""
    assert order(11, seed=0, epoch=0) == [1, 9, 4, 8, 5, 3, 0, 2, 6, 7, 10]


def test_dropping_all_samples_is_refused():
    with pytest.raises(UserError, match="drops all 10 images"):
        make_samplers(10, 11, 1, drop_last=True)
