"""Random-looking numbers that are functions of what they are for, not of who draws them, nor when."""

from collections.abc import Sequence

from torch import Tensor

BITS_32 = 0xFFFFFFFF


def mix32(state: Tensor) -> Tensor:
    """Scramble 32-bit numbers, held in int64, one to one.

    The "lowbias32" mixer (https://nullprogram.com/blog/2018/07/31/).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = ((state ^ (state >> shift)) * factor) & BITS_32
    return state ^ (state >> 16)


def hash32(values: Tensor, *words: int | Tensor) -> Tensor:
    """Hash (value, words...) to 32 random-looking bits, as int64 of the shape of ``values``."""
    state = mix32(values & BITS_32)
    for word in words:
        state = mix32((state ^ word) & BITS_32)
    return state


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
