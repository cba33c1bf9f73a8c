"""A pseudorandom permutation of which any part is computed without the rest."""

from collections.abc import Sequence

from torch import Tensor

from distlenet.utils.keyed_random import mix32


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
        """Return the numbers at ``positions``, int64 (n,) from 0 to ``size`` - 1."""
        numbers = self._network(positions)
        while len(outside := (numbers >= self.size).nonzero().squeeze(1)):
            numbers[outside] = self._network(numbers[outside])
        return numbers

    def _network(self, numbers: Tensor) -> Tensor:
        left_bits, right_bits = self.widths
        left, right = numbers >> right_bits, numbers & ((1 << right_bits) - 1)
        for key in self.keys:
            left, right = right, left ^ (mix32(right ^ key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right
