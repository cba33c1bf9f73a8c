"""The quantile function of the normal distribution, with the same bits on every device and in every position.

``erfinv``, ``log`` and ``cos`` of a tensor may differ in their last bits between devices, and between the vectorised
part of a tensor and its end. Here, a table of cubic polynomials is evaluated with single additions and
multiplications, which IEEE 754 rounds exactly.
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

OCTAVES, SEGMENT_BITS = 32, 5
SEGMENTS = 2**SEGMENT_BITS  # per octave
NODES = (0.0, 0.25, 0.75, 1.0)  # of the interpolation in a segment: those of Chebyshev-Lobatto
OFFSET_BITS = 52 - SEGMENT_BITS  # of float64's fraction, the bits after the number of the segment


def normal_quantile(bits: Tensor) -> Tensor:
    """Map 32 random bits, in int64, to a standard normal number, float32.

    The first bit is the sign, the others the tail's probability: (k + 0.5) / 2**32. The result is within 1e-8 of the
    exact quantile, before it is rounded to float32; its absolute value is at most 6.34.
    """
    odd = (bits & 0x7FFFFFFF).mul_(2).add_(1).double()  # exact: the probability × 2**33, at least 1
    pattern = odd.view(torch.int64)  # exponent and fraction
    segment = (pattern >> OFFSET_BITS) - (1023 << SEGMENT_BITS)
    offset = (pattern & (2**OFFSET_BITS - 1)).double().mul_(2.0**-OFFSET_BITS)  # in the segment, in [0, 1)
    constant, linear, quadratic, cubic = _table(bits.device)
    value = cubic[segment]
    for coefficients in (quadratic, linear, constant):
        value.mul_(offset).add_(coefficients[segment])  # separately rounded, not fused
    return torch.where(bits >> 31 == 0, value, -value).float()


@cache
def _table(device: torch.device) -> tuple[Tensor, ...]:
    """Return the coefficients of each power, float64 (segments,)."""
    rows = torch.tensor(
        [_cubic(octave, segment) for octave in range(OCTAVES) for segment in range(SEGMENTS)], dtype=torch.float64
    )
    return tuple(rows.T.contiguous().to(device))


def _cubic(octave: int, segment: int) -> list[float]:
    """Return the coefficients, from the constant on, of the cubic polynomial through the quantiles at NODES."""
    normal = NormalDist()
    y = [-normal.inv_cdf(2.0 ** (octave - 33) * (1 + (segment + node) / SEGMENTS)) for node in NODES]
    # Newton's divided differences, expanded.
    first = [(y[k + 1] - y[k]) / (NODES[k + 1] - NODES[k]) for k in range(3)]
    second = [(first[k + 1] - first[k]) / (NODES[k + 2] - NODES[k]) for k in range(2)]
    third = (second[1] - second[0]) / (NODES[3] - NODES[0])
    linear = first[0] - second[0] * NODES[1] + third * NODES[1] * NODES[2]
    quadratic = second[0] - third * (NODES[1] + NODES[2])
    # Rounded, so that the last bits of the logarithm, which differ between machines, have no effect.
    return [round(value * 2**40) / 2**40 for value in (y[0], linear, quadratic, third)]
