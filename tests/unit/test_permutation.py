import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.data.permutation import Permutation, _mix32
from distlenet.data.sampler import GlobalBatchSampler, permutation
from distlenet.utils.keyed_random import mix32

pytestmark = pytest.mark.unit

keys = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8)


@given(st.integers(1, 3000), keys)
def test_every_number_occurs_once(size, keys):
    numbers = Permutation(size, keys)(torch.arange(size))
    assert torch.equal(numbers.sort().values, torch.arange(size))


@given(st.integers(1, 2**62), keys, st.data())
def test_numbers_of_any_size_are_in_range_and_distinct(size, keys, data):
    drawn = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    positions = torch.tensor(drawn, dtype=torch.int64)
    numbers = Permutation(size, keys)(positions)
    assert bool(((numbers >= 0) & (numbers < size)).all())
    assert len(numbers.unique()) == len(positions)


def test_a_part_is_computed_without_the_rest():
    """A list of 10**15 numbers would take 8 petabytes."""
    huge = permutation(10**15, seed=0, epoch=0)
    positions = torch.tensor([0, 7, 10**14])
    assert torch.equal(huge(positions)[1:], huge(positions[1:]))

    class Huge:
        def __len__(self) -> int:
            return 10**15

    batch = next(iter(GlobalBatchSampler(Huge(), 2**16, 5, 4096, 0, drop_last=False, virtual_shards=None)))
    assert torch.equal(batch, huge(torch.arange(5, 2**16, 4096)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [10, 60_000])
def test_all_numbers_are_equally_likely_at_a_position(size):
    """Numbers at the first, a middle and the last position, over 4,000 permutations, in 10 equal bins.

    Chi-square with 9 degrees of freedom: 99.9999 % of fair draws are below 45; three positions and two sizes.
    """
    positions = torch.tensor([0, size // 3, size - 1])
    drawn = torch.stack([permutation(size, seed, epoch)(positions) for seed in range(200) for epoch in range(20)])
    for column in (drawn * 10 // size).T:
        counts = torch.bincount(column, minlength=10).double()
        assert float(((counts - 400) ** 2 / 400).sum()) < 45


def test_neighbouring_numbers_are_uncorrelated():
    """Correlation over 60,000 positions: its standard deviation is 1/sqrt(60,000) = 0.0041; five of them."""
    numbers = permutation(60_000, 0, 0)(torch.arange(60_000)).double()
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 5 * 0.0041
    assert abs(float(torch.corrcoef(torch.stack([numbers, torch.arange(60_000.0)]))[0, 1])) < 5 * 0.0041


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_the_mixer_is_that_of_the_random_numbers(values):
    assert _mix32(np.array(values, np.uint32)).tolist() == mix32(torch.tensor(values)).tolist()
