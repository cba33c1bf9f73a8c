"""Sums that do not depend on the order of their terms.

Floating-point addition rounds, so a sum depends on its order: on the number of ranks, on the ring or tree. A float64
that is a multiple of 2**-b is exact up to 2**(53-b), and so is every sum of such numbers below that bound: no addition
rounds, and every order gives the same bits. NaN and infinity propagate through these sums.
"""

from torch import Tensor

LOSS_BITS = 20
"""Losses are rounded to multiples of 2**-20 nats. Their sums are exact up to 2**33 nats: at least a billion images."""


def round_to_grid(values: Tensor, bits: int) -> Tensor:
    """Round float64 ``values`` to multiples of 2**-bits, in place, and return them."""
    return values.mul_(2.0**bits).round_().mul_(2.0**-bits)  # scaling by a power of two is exact
