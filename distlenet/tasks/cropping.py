"""Random resized crops of a batch: another part of each image, resized to one size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from distlenet.tasks.boxes import center_boxes, random_boxes


class Taps(NamedTuple):
    """The pixels of which each pixel of a result is the sum, int64 (n, taps, size), and their weights, float32."""

    rows: Tensor
    row_weights: Tensor
    columns: Tensor
    column_weights: Tensor


@dataclass(frozen=True)
class Cropping:
    """Cut a part out of each image and resize it to ``size``, as RandomResizedCrop of torchvision.transforms.v2.

    ``scale`` and ``ratio`` are the ranges of area and width / height; see ``random_boxes``. Bilinear, with
    antialiasing. The result is not rounded: it equals that of v2 for images of float32, not of uint8. If ten
    attempts fail, the box is the largest in the center whose width / height is in ``ratio``, as in v2.

    In evaluation, the box is the largest in the center that has the proportions of ``size``, times ``center``. As v2
    with Resize and CenterCrop, except that pixels outside the box have no influence.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    center: float = 1.0

    def taps(self, draws: Tensor | None, like: Tensor, mirrored: Tensor | None) -> Taps:
        """Return which pixels of the images ``like``, (n, C, H, W), are added; without ``draws`` of the centers.

        ``mirrored``, bool (n,) or None, selects images that are mirrored too. No host sync.
        """
        shape = like.shape[-2], like.shape[-1]
        if draws is None:  # in an exported network, one box for all images
            boxes = center_boxes(like[:1] if torch.compiler.is_exporting() else like, shape, self._center(shape))
        else:
            boxes = random_boxes(draws, shape, self.scale, self.ratio, shape, _inside(shape, *self.ratio))
        rows = _taps(boxes.top, boxes.height, shape[0], self.size[0], None)
        return Taps(*rows, *_taps(boxes.left, boxes.width, shape[1], self.size[1], mirrored))

    def _center(self, shape: tuple[int, int]) -> tuple[int, int]:
        proportions = self.size[1] / self.size[0]
        height, width = (max(1, round(side * self.center)) for side in shape)
        return _inside((height, width), proportions, proportions)


def _inside(size: tuple[int, int], low: float, high: float) -> tuple[int, int]:
    """Return the largest height and width in ``size`` whose width / height is from ``low`` to ``high``."""
    height, width = size
    if width < height * low:
        return min(height, max(1, round(width / low))), width
    return height, min(width, max(1, round(height * high)))


def _taps(start: Tensor, length: Tensor, total: int, size: int, mirrored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return pixels and weights in one direction, for boxes with ``start`` and ``length`` (n,) in ``total`` pixels.

    The weights are those of ``torch.nn.functional.interpolate`` with ``antialias=True``: a triangle whose half width
    is one pixel of the result, at least one of the image.
    """
    pixel = torch.arange(size, dtype=torch.float64, device=start.device) + 0.5
    if mirrored is not None:
        pixel = torch.where(mirrored.unsqueeze(1), size - pixel, pixel)
    length = length.double().unsqueeze(1)
    scale = length / size
    support = scale.clamp_min(1)
    center = scale * pixel
    first = (center - support + 0.5).clamp_min_(0).floor_()
    taps = torch.arange(max(2, math.ceil(2 * total / size)), dtype=torch.float64, device=start.device).unsqueeze(1)
    start, length, center, support, first = (
        x.unsqueeze(1) for x in (start.unsqueeze(1), length, center, support, first)
    )
    position = first + taps
    weight = ((position + 0.5 - center).abs_() / support).neg_().add_(1).clamp_min_(0) * (position < length)
    total_weight = reduce(torch.add, weight.unbind(1)).unsqueeze(1)  # in this order on any device
    return torch.minimum(position, length - 1).long() + start, (weight / total_weight).float()


def resample(images: Tensor, taps: Taps) -> Tensor:
    """Return the sums of ``taps`` of images (n, C, H, W): float32 (n, C, height, width). No host sync.

    First along the columns, then along the rows. Only selections, products and sums, of one image each: the bits of
    the result depend on neither the batch nor the device.
    """
    n, channels, height, width = images.shape
    if torch.compiler.is_exporting():  # a smaller graph, whose results differ in the last bits
        rows, columns = _matrix(taps.rows, taps.row_weights, height), _matrix(taps.columns, taps.column_weights, width)
        return rows @ images.float() @ columns.T
    uint8 = images.dtype == torch.uint8
    size = taps.rows.shape[-1], taps.columns.shape[-1]
    planes = torch.arange(0, n * channels * height, height, device=images.device).view(n, channels, 1)
    lines = images.float().reshape(n * channels * height, width)
    parts = (
        lines.index_select(0, (planes + row.unsqueeze(1)).flatten())
        .view(n, channels, size[0], width)
        .mul_(weight.view(n, 1, size[0], 1))
        for row, weight in _used(taps.rows, taps.row_weights, uint8)
    )
    resized = reduce(Tensor.add_, parts)
    parts = (
        resized.gather(3, column.view(n, 1, 1, size[1]).expand(n, channels, *size)).mul_(weight.view(n, 1, 1, size[1]))
        for column, weight in _used(taps.columns, taps.column_weights, uint8)
    )
    return reduce(Tensor.add_, parts)


def _matrix(positions: Tensor, weights: Tensor, total: int) -> Tensor:
    """Return the taps of one image, (1, taps, size), as a matrix (size, total), whose products are the sums."""
    selected = positions[0].unsqueeze(2) == torch.arange(total, device=positions.device)
    return (selected * weights[0].unsqueeze(2)).sum(0)


def _used(positions: Tensor, weights: Tensor, finite: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tap; on the CPU not the last ones if no image needs them: with 0 more, a sum has the same bits."""
    for position, weight in zip(positions.unbind(1), weights.unbind(1), strict=True):
        if finite and weight.device.type == "cpu" and not weight.any():
            return
        yield position, weight
