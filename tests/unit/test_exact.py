import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.utils.exact_sums import round_to_grid
from distlenet.utils.keyed_random import seed_micro_batch

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
small = st.floats(-(2.0**10), 2.0**10, width=32)


@given(st.lists(small, min_size=1, max_size=50), st.integers(0, 40))
def test_values_are_rounded_to_the_nearest_step(values, bits):
    rounded = round_to_grid(torch.tensor(values, dtype=torch.float64), bits).tolist()
    for value, got in zip(values, rounded, strict=True):
        steps = Fraction(got) * 2**bits
        assert steps.denominator == 1
        assert abs(steps - Fraction(value) * 2**bits) <= Fraction(1, 2)


@given(st.lists(small, min_size=2, max_size=200), st.randoms(use_true_random=False))
def test_sums_are_exact_in_any_order(values, random):
    rounded = round_to_grid(torch.tensor(values, dtype=torch.float64), 40).tolist()
    total = sum(map(Fraction, rounded))
    random.shuffle(rounded)
    left_to_right = 0.0
    for value in rounded[: 2**2]:  # four values of up to 2**10 stay below the bound of 2**13
        left_to_right += value
    assert Fraction(left_to_right) == sum(map(Fraction, rounded[:4]))
    if abs(total) < 2**12 and sum(map(abs, rounded)) < 2**13:
        assert Fraction(float(torch.tensor(rounded, dtype=torch.float64).sum())) == total


def test_plain_floats_are_not():
    """What this is for: the same three numbers, two orders, two sums."""
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    a, b, c = round_to_grid(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 40).tolist()
    assert (a + b) + c == a + (b + c)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(value):
    rounded = round_to_grid(torch.tensor([value, 1.0], dtype=torch.float64), 20)
    assert not rounded[0].isfinite()
    assert not rounded.sum().isfinite()


def test_random_numbers_depend_on_seed_step_and_shard_alone():
    def draw(*place: int) -> tuple[float, ...]:
        seed_micro_batch(CPU, *place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, shard) for seed in range(4) for step in range(4) for shard in range(4)]
    first = {place: draw(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert {place: draw(*place) for place in reversed(places)} == first
