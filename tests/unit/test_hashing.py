import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.data.permutation import Permutation
from distlenet.data.sampler import GlobalBatchSampler, permutation
from distlenet.utils.keyed_random import mix32

pytestmark = pytest.mark.unit

keys = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8)


@given(st.integers(1, 3000), keys)
def test_every_number_has_one_place(size, keys):
    order = Permutation(size, keys)(torch.arange(size))
    assert torch.equal(order.sort().values, torch.arange(size))


@given(st.integers(1, 2**62), keys, st.data())
def test_numbers_of_any_size_stay_below_it_and_apart(size, keys, data):
    places = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50)), dtype=torch.int64)
    numbers = Permutation(size, keys)(places)
    assert bool(((numbers >= 0) & (numbers < size)).all())
    assert len(numbers.unique()) == len(places)


def test_a_part_is_had_without_the_rest():
    """A list of 10**15 numbers would take 8 petabytes."""
    huge = permutation(10**15, seed=0, epoch=0)
    places = torch.tensor([0, 7, 10**14])
    assert torch.equal(huge(places)[1:], huge(places[1:]))

    class Huge:
        def __len__(self) -> int:
            return 10**15

    batch = next(iter(GlobalBatchSampler(Huge(), 2**16, 5, 4096, seed=0)))
    assert torch.equal(batch, huge(torch.arange(5, 2**16, 4096)))


@pytest.mark.parametrize("size", [10, 60_000])
def test_every_number_is_as_likely_in_every_place(size):
    """Numbers at the first, some middle and the last place, over 20,000 orders, in 10 equal bins.

    Chi-square with 9 degrees of freedom: 99.9999 % of fair draws are below 45; three places and two sizes.
    """
    places = torch.tensor([0, size // 3, size - 1])
    drawn = torch.stack([permutation(size, seed, epoch)(places) for seed in range(200) for epoch in range(100)])
    for column in (drawn * 10 // size).T:
        counts = torch.bincount(column, minlength=10).double()
        assert float(((counts - 2000) ** 2 / 2000).sum()) < 45


def test_an_order_does_not_tell_the_next_number():
    """Rank correlation of neighbours over 60,000 places: deviation 1/sqrt(60,000) = 0.0041; five of them."""
    order = permutation(60_000, 0, 0)(torch.arange(60_000)).double()
    assert abs(float(torch.corrcoef(torch.stack([order[:-1], order[1:]]))[0, 1])) < 5 * 0.0041
    assert abs(float(torch.corrcoef(torch.stack([order, torch.arange(60_000.0)]))[0, 1])) < 5 * 0.0041


def test_the_mixer_loses_nothing():
    numbers = torch.cat([torch.arange(100_000), torch.arange(2**32 - 100_000, 2**32)])
    assert len(mix32(numbers).unique()) == 200_000
    assert int(mix32(numbers).max()) < 2**32
