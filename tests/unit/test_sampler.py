import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.data.sampler import GlobalBatchSampler, ShardSampler, permutation
from distlenet.data.sources import ImageDataset
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def split(samples: int) -> ImageDataset:
    return ImageDataset(torch.zeros(samples, 1, 1, dtype=torch.uint8), torch.zeros(samples, dtype=torch.int64))


def samplers(samples, batch, world_size, seed=0, drop_last=False):
    data = split(samples)
    return [GlobalBatchSampler(data, batch, rank, world_size, seed, drop_last) for rank in range(world_size)]


def global_batches(samples, batch, world_size, seed=0, epoch=0, start=0, drop_last=False):
    """Return each step's samples over all ranks, in the order of their positions."""
    ranks = samplers(samples, batch, world_size, seed, drop_last)
    for sampler in ranks:
        sampler.set_position(epoch, start)
    steps = list(zip(*(list(sampler) for sampler in ranks), strict=True))  # strict: all ranks step equally often
    assert len(steps) == len(ranks[0])
    merged = []
    for parts in steps:
        batch_of_step = torch.full((sum(len(part) for part in parts),), -1)
        for rank, part in enumerate(parts):
            batch_of_step[rank::world_size] = part
        merged.append(batch_of_step)
    return merged


sizes = st.tuples(st.integers(1, 1000), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 8]))


@given(sizes, st.integers(0, 3), st.booleans())
def test_global_batches_do_not_depend_on_the_world_size(size, epoch, drop_last):
    samples, per_rank, world_size = size
    batch = per_rank * world_size
    if drop_last and batch > samples:
        return
    alone = global_batches(samples, batch, 1, epoch=epoch, drop_last=drop_last)
    shared = global_batches(samples, batch, world_size, epoch=epoch, drop_last=drop_last)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@given(sizes, st.integers(0, 3))
def test_an_epoch_has_every_sample_once(size, epoch):
    samples, per_rank, world_size = size
    seen = torch.cat(global_batches(samples, per_rank * world_size, world_size, epoch=epoch))
    assert torch.equal(seen.sort().values, torch.arange(samples))


@given(sizes, st.integers(0, 30))
def test_starting_late_gives_the_rest_of_the_same_epoch(size, start):
    samples, per_rank, world_size = size
    whole = global_batches(samples, per_rank * world_size, world_size)
    rest = global_batches(samples, per_rank * world_size, world_size, start=min(start, len(whole)))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


def test_batches_are_full_but_for_the_last_which_count_knows():
    (sampler,) = samplers(10, 4, 1)
    assert [len(part) for part in sampler] == [4, 4, 2] == [sampler.count(step) for step in range(3)]
    (dropping,) = samplers(10, 4, 1, drop_last=True)
    assert [len(part) for part in dropping] == [4, 4]


def test_a_rank_may_get_nothing_of_the_last_batch():
    assert [[len(part) for part in rank] for rank in samplers(9, 4, 4)] == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]]


def order(samples, seed, epoch):
    return permutation(samples, seed, epoch)(torch.arange(samples)).tolist()


def test_seeds_and_epochs_do_not_share_orders():
    """DistributedSampler adds them: its epoch 1 of seed 0 is epoch 0 of seed 1."""
    orders = {tuple(order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_this_one_for_ever():
    """A change here changes the result of every run: it must be meant."""
    assert order(11, seed=0, epoch=0) == [1, 9, 4, 8, 5, 3, 0, 2, 6, 7, 10]


def test_dropping_everything_is_refused():
    with pytest.raises(UserError, match="drops all 10 images"):
        samplers(10, 11, 1, drop_last=True)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 9))
def test_shards_have_every_sample_once_in_chunks_that_do_not_depend_on_ranks(samples, chunk, world_size):
    shards = [ShardSampler(samples, chunk, rank, world_size) for rank in range(world_size)]
    chunks = [part.tolist() for shard in shards for part in shard]
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    alone = [part.tolist() for part in ShardSampler(samples, chunk, 0, 1)]
    assert sorted(chunks) == alone
    assert [sample for part in alone for sample in part] == list(range(samples))
