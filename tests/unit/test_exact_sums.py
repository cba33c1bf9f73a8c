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
    rounded = round_to_grid(torch.tensor(values, dtype=torch.float64), 40).tolist()
    total = sum(map(Fraction, rounded))
    random.shuffle(rounded)
    first_four = 0.0
    for value in rounded[:4]:  # four values of up to 2**10 stay below the bound of 2**13
        first_four += value
    assert Fraction(first_four) == sum(map(Fraction, rounded[:4]))
    if abs(total) < 2**12 and sum(map(abs, rounded)) < 2**13:
        assert Fraction(float(torch.tensor(rounded, dtype=torch.float64).sum())) == total


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
