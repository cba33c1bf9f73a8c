import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distlenet.utils.exact_sums import round_to_grid

pytestmark = pytest.mark.unit

small = st.floats(-(2.0**10), 2.0**10, width=32)


@given(st.lists(small, min_size=1, max_size=50), st.integers(0, 40))
def test_values_are_rounded_to_the_nearest_multiple(values, bits):
    rounded = round_to_grid(torch.tensor(values, dtype=torch.float64), bits).tolist()
    for value, result in zip(values, rounded, strict=True):
        multiple = Fraction(result) * 2**bits
        assert multiple.denominator == 1
        assert abs(multiple - Fraction(value) * 2**bits) <= Fraction(1, 2)


@given(st.lists(small, min_size=2, max_size=200), st.randoms(use_true_random=False))
def test_sums_are_exact_in_any_order(values, random):
    rounded = round_to_grid(torch.tensor(values, dtype=torch.float64), 35)
    total = sum(map(Fraction, rounded.tolist()))  # below 200 × 2**10, and so below the bound of 2**(53 - 35)
    shuffled = rounded[random.sample(range(len(values)), len(values))]
    for result in (shuffled.sum(), shuffled.cumsum(0)[-1]):
        assert Fraction(result.item()) == total


def test_sums_of_other_floats_depend_on_the_order():
    """The reason for the grid."""
    assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)
    a, b, c = round_to_grid(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 40).tolist()
    assert (a + b) + c == a + (b + c)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_propagate(value):
    rounded = round_to_grid(torch.tensor([value, 1.0], dtype=torch.float64), 20)
    assert not rounded[0].isfinite()
    assert not rounded.sum().isfinite()
