"""A random-looking order of samples, any part of which is computed without the rest."""

from collections.abc import Sequence

from torch import Tensor

from distlenet.utils.keyed_random import mix32


class Permutation:
    """A random-looking order of the numbers below ``size``, any part of which is had without the rest.

    A Feistel network permutes the numbers of ``bits`` bits, whatever its round function is; those that fall on
    ``size`` or beyond go through it again until they do not ("cycle walking"), less than twice on average
    (Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So neither time nor memory grow with
    ``size``, where a shuffled list of a billion numbers takes 8 GB and a minute on every rank.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        """Order ``size`` numbers, at most 2**62, as ``keys`` say: one number of 32 bits for each round."""
        self.size, self.keys = size, keys
        bits = max(2, (size - 1).bit_length())
        self.widths = bits // 2, bits - bits // 2  # bits of the left and of the right half

    def __call__(self, places: Tensor) -> Tensor:
        """Return which numbers stand at ``places``: int64 (n,), each at least 0 and less than ``size``."""
        numbers = self._network(places)
        while len(beyond := (numbers >= self.size).nonzero().squeeze(1)):
            numbers[beyond] = self._network(numbers[beyond])
        return numbers

    def _network(self, numbers: Tensor) -> Tensor:
        left_bits, right_bits = self.widths
        left, right = numbers >> right_bits, numbers & ((1 << right_bits) - 1)
        for key in self.keys:
            left, right = right, left ^ (mix32(right ^ key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right
