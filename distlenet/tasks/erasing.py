"""Random erasing of a batch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distlenet.tasks.boxes import random_boxes


class Mask(NamedTuple):
    """A rectangle in each of n images: which rows, bool (n, H), and which columns, bool (n, W)."""

    rows: Tensor
    columns: Tensor

    def erase(self, images: Tensor) -> Tensor:
        """Set the rectangles of images, float32 (n, C, H, W), to 0 in place."""
        keep = ~(self.rows[:, None, :, None] & self.columns[:, None, None, :])
        return images.mul_(keep.float())  # faster than masked_fill_ on the CPU


@dataclass(frozen=True)
class Erasing:
    """Erase a rectangle of an image with probability ``p``, as RandomErasing of torchvision.transforms.v2.

    ``scale`` and ``ratio`` are the ranges of area and height / width; see ``random_boxes``. The value is 0, which is
    the mean color of normalised images. As in v2, nothing is erased if ten attempts fail. Unlike in v2, an attempt
    also fails if the rectangle is empty.
    """

    p: float
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def mask(self, chance: Tensor, draws: Tensor, size: tuple[int, int]) -> Mask:
        """Return the rectangles in images of ``size``. No host sync.

        The random numbers, in [0, 1), are ``chance`` (n,) and ``draws`` (n, BOX_DRAWS).
        """
        height, width = size
        ratio = 1 / self.ratio[1], 1 / self.ratio[0]
        boxes = random_boxes(draws, size, self.scale, ratio, (height - 1, width - 1), (0, 0))
        rows = torch.arange(height, device=draws.device) - boxes.top.unsqueeze(1)
        columns = torch.arange(width, device=draws.device) - boxes.left.unsqueeze(1)
        erased = (chance < self.p).unsqueeze(1)
        return Mask(
            (rows >= 0) & (rows < boxes.height.unsqueeze(1)) & erased,
            (columns >= 0) & (columns < boxes.width.unsqueeze(1)),
        )
