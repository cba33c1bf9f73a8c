"""Rectangles in images: random ones as torchvision draws them, and the center."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ATTEMPTS = 10
BOX_DRAWS = 2 * ATTEMPTS + 2  # random numbers of a box: areas, proportions, and the position


@dataclass(frozen=True)
class Boxes:
    """A rectangle in each of n images, in pixels: int64 (n,) each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_boxes(
    draws: Tensor,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    largest: tuple[int, int],
    otherwise: tuple[int, int],
) -> Boxes:
    """Return boxes in images of ``size`` from ``draws``, float32 (n, BOX_DRAWS) in [0, 1).

    As in RandomResizedCrop and RandomErasing of torchvision, there are ten attempts. The area is uniform in ``scale``
    times that of the image, and width / height is log-uniform in ``ratio``. Both sides are rounded. The box is the
    first attempt with 1 to ``largest`` rows and columns, at a uniform position. If all attempts fail, the box is in
    the center and has the sides ``otherwise``. No host sync.
    """
    draws = draws.double()
    areas = size[0] * size[1] * (draws[:, :ATTEMPTS] * (scale[1] - scale[0]) + scale[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = (draws[:, ATTEMPTS : 2 * ATTEMPTS] * (high - low) + low).exp()
    ratios = (ratios * 2**30).round() * 2**-30  # without the last bits of exp, which differ between devices
    heights, widths = (areas / ratios).sqrt().round().long(), (areas * ratios).sqrt().round().long()
    fits = (heights >= 1) & (heights <= largest[0]) & (widths >= 1) & (widths <= largest[1])
    found, first = fits.any(1), fits.byte().argmax(1, keepdim=True)  # the first of several
    height = torch.where(found, heights.gather(1, first).squeeze(1), otherwise[0])
    width = torch.where(found, widths.gather(1, first).squeeze(1), otherwise[1])
    top = torch.where(found, (draws[:, -2] * (size[0] - height + 1)).long(), (size[0] - otherwise[0]) // 2)
    left = torch.where(found, (draws[:, -1] * (size[1] - width + 1)).long(), (size[1] - otherwise[1]) // 2)
    return Boxes(top, left, height, width)


def center_boxes(like: Tensor, size: tuple[int, int], sides: tuple[int, int]) -> Boxes:
    """Return the box of height and width ``sides`` in the center of ``size``, for each of the n images ``like``.

    The position is rounded down: CenterCrop of torchvision rounds some of the halves up.
    """
    top, left = (size[0] - sides[0]) // 2, (size[1] - sides[1]) // 2
    count, device = like.shape[0], like.device
    return Boxes(*(torch.full((count,), each, dtype=torch.int64, device=device) for each in (top, left, *sides)))
