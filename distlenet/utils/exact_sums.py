"""Sums whose order does not matter, and random numbers that do not depend on who draws them.

Adding floats rounds, so a sum depends on its order: on the number of ranks, on ring or tree. A float64 that
is a multiple of 2**-b is exact up to 2**(53-b), and so is every sum of such numbers below that: no addition
rounds, and any order gives the same bits. NaN and infinity pass through such sums and stay visible.
"""

from torch import Tensor

LOSS_BITS = 20
"""Losses are summed in steps of 2**-20 nats: exact up to 2**33 nats, a billion images and more."""


def round_to_grid(values: Tensor, bits: int) -> Tensor:
    """Round float64 ``values``, in place, to multiples of 2**-bits; return them. Powers of two scale exactly."""
    return values.mul_(2.0**bits).round_().mul_(2.0**-bits)
