"""A pseudorandom permutation of which any part is computed without the rest."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Halves = NDArray[np.uint32]


class Permutation:
    """A pseudorandom permutation of the numbers 0 to ``size`` - 1, evaluated at any positions.

    A Feistel network permutes the numbers of a fixed bit width for every round function; results of ``size`` or more
    pass through it again until they are below ("cycle walking"), less than twice on average (Black & Rogaway, "Ciphers
    with Arbitrary Finite Domains", 2002). Time and memory do not grow with ``size``, while a shuffled list of a
    billion numbers takes 8 GB and a minute on every rank.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        """Permute ``size`` numbers, at most 2**62, with one 32-bit key for each round."""
        self.size, self.keys = size, keys
        bits = max(2, (size - 1).bit_length())
        self.widths = bits // 2, bits - bits // 2  # of the left and the right half

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the numbers at ``positions``, int64 (n,) from 0 to ``size`` - 1, on the host."""
        numbers = self._network(positions.numpy())
        while len(outside := np.nonzero(numbers >= self.size)[0]):
            numbers[outside] = self._network(numbers[outside])
        return torch.from_numpy(numbers)

    def _network(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        left_bits, right_bits = self.widths  # at most 31
        left = (numbers >> right_bits).astype(np.uint32)
        right = (numbers & ((1 << right_bits) - 1)).astype(np.uint32)
        for key in self.keys:
            left, right = right, left ^ (_mix32(right ^ np.uint32(key)) & np.uint32((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left.astype(np.int64) << right_bits) | right


def _mix32(state: Halves) -> Halves:
    """Apply the mixer of ``distlenet.utils.keyed_random``: numpy has 32-bit products, and is six times as fast."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = (state ^ (state >> np.uint32(shift))) * np.uint32(factor)
    return state ^ (state >> np.uint32(16))
