"""Scenes: a noisy grey canvas with one to four images of a classification set, and the box and class of each."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64  # pixels of a scene, in both directions
MAX_ITEMS = 4
SIDES = (16, 32)  # smallest and largest side of an item, in pixels
VISIBLE = 32  # a pixel of an item is inside its box if it is brighter than this
MAX_OVERLAP = 0.2  # of two boxes: intersection over union

Scene = tuple[Tensor, Tensor, Tensor]
"""Image uint8 (SIZE, SIZE); boxes float32 (m, 4) as left, top, right, bottom; labels int64 (m,). m is at least 1."""


@dataclass(frozen=True)
class Scenes:
    """``count`` scenes of ``items``, a map-style dataset of (image uint8 (H, W), label).

    Scene i is a function of ``seed`` and i only: it is the same in every epoch.
    """

    items: Any
    count: int
    seed: int

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> Scene:
        """Compose one scene. An item that would cover another one is left out."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + index)

        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        canvas = integer(0, 32) + torch.randint(0, 32, (SIZE, SIZE), generator=generator)
        boxes, labels = torch.zeros(0, 4), []
        for _ in range(integer(1, MAX_ITEMS + 1)):
            image, label = self.items[integer(0, len(self.items))]
            crop = visible_part(resize(image, integer(SIDES[0], SIDES[1] + 1)))
            height, width = crop.shape
            top, left = integer(0, SIZE - height + 1), integer(0, SIZE - width + 1)
            box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
            if (overlap(box, boxes) > MAX_OVERLAP).any():
                continue
            part = canvas[top : top + height, left : left + width]
            part.copy_(torch.maximum(part, crop))
            boxes, labels = torch.cat([boxes, box]), [*labels, label]
        return canvas.to(torch.uint8), boxes, torch.tensor(labels)


def resize(image: Tensor, side: int) -> Tensor:
    """Return an image as int64 (side, side)."""
    resized = F.interpolate(image[None, None].float(), (side, side), mode="bilinear", antialias=True)
    return resized[0, 0].round().long()


def visible_part(image: Tensor) -> Tensor:
    """Return the smallest rectangle that holds all bright pixels."""
    rows, columns = (image > VISIBLE).any(1).nonzero(), (image > VISIBLE).any(0).nonzero()
    if not len(rows):
        return image
    return image[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of all pairs of boxes: (..., n, 4) and (..., m, 4) give (..., n, m)."""
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides.prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) for boxes in (a, b)]
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=1e-6)


def collate(samples: list[Scene]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return images (n, SIZE, SIZE), and a list with the boxes and labels of each scene: their numbers differ."""
    return torch.stack([image for image, _, _ in samples]), [(boxes, labels) for _, boxes, labels in samples]
