"""From stored bytes to network input, vectorised over a batch, on the device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distlenet.task import SampleKeys

SIZE = 32  # height and width of the network's input, pixels
SAMPLED_PARTS, PART_SIZE = 64, 1024  # a large set is measured on so many parts of so many images


class ImageTransform:
    """Pad to 32×32, augment if asked, and normalise with the training set's mean and standard deviation."""

    def __init__(self, mean: float, std: float, augment: str = "none", max_shift: int = 2) -> None:
        """Take the values that ``mean_and_std`` returns.

        ``augment`` is none, shift or flip_shift; ``max_shift`` is in pixels.
        """
        self.mean, self.std = mean, std
        self.augment, self.max_shift = augment, max_shift

    def __call__(self, images: Tensor, keys: SampleKeys | None = None) -> Tensor:
        """Turn uint8 (n, H, W), H and W up to 32, into float32 (n, 1, 32, 32); augment only with ``keys``."""
        images = _pad(images)
        if keys is not None and self.augment != "none":
            images = self._augment(images, keys.bits())
        return images.float().sub_(self.mean).div_(self.std).unsqueeze(1)

    def _augment(self, images: Tensor, bits: Tensor) -> Tensor:
        if self.augment == "flip_shift":
            images = torch.where((bits & 1).bool()[:, None, None], images.flip(2), images)
        span = 2 * self.max_shift + 1
        rows = (bits >> 8) % span  # the remainders of 24 and 12 random bits: nearly uniform
        columns = (bits >> 20) % span
        return _shift(images, rows, columns, self.max_shift)


def mean_and_std(images: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of uint8 images (N, H, W); of a large set, of 64 evenly spaced parts.

    Both are exact: they are computed from a histogram of the 256 values.
    """
    counts = torch.stack([torch.bincount(part.flatten(), minlength=256) for part in _parts(images)]).sum(0).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return float(mean), max(float(variance.sqrt()), 1.0)  # a set of a single colour can still be trained on


def _parts(images: Tensor) -> Iterator[Tensor]:
    """Yield all images in parts or, of a large set, evenly spaced parts including the first and the last."""
    last = len(images) - PART_SIZE
    if last < SAMPLED_PARTS * PART_SIZE:
        starts: Iterator[int] = iter(range(0, len(images), PART_SIZE))
    else:
        starts = (k * last // (SAMPLED_PARTS - 1) for k in range(SAMPLED_PARTS))
    return (images[start : start + PART_SIZE] for start in starts)


def _pad(images: Tensor) -> Tensor:
    height, width = images.shape[1:]
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    return F.pad(images, (left, SIZE - width - left, top, SIZE - height - top))


def _shift(images: Tensor, rows: Tensor, columns: Tensor, limit: int) -> Tensor:
    """Move each image of (n, H, W) by (limit - rows, limit - columns) pixels, filling with zeros."""
    height, width = images.shape[1:]
    padded = F.pad(images, (limit, limit, limit, limit))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view: (n, 2 limit + 1, 2 limit + 1, H, W)
    return windows[torch.arange(len(images), device=images.device), rows, columns]
