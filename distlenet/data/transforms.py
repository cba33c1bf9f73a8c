"""From stored bytes to network input, vectorised over a batch, on the device.

Augmentation draws from a hash of (seed, epoch, sample index), not from a stream of random numbers: what
happens to an image does not depend on ranks, workers, restarts or its neighbours in the batch.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distlenet.utils.keyed_random import hash32

SIZE = 32  # height and width of the network's input, pixels
PARTS, PART = 64, 1024  # what of a set is measured: parts, images of each


class Prepare:
    """Pad to 32×32, augment where asked, and normalise with the training set's mean and deviation."""

    def __init__(self, mean: float, std: float, augment: str = "none", seed: int = 0, shift: int = 2) -> None:
        """Take a training set's mean and deviation, as ``measure`` returns them.

        ``augment`` is none, shift or flip_shift; ``shift`` the most, pixels.
        """
        self.mean, self.std = mean, std
        self.augment = augment
        self.seed = seed
        self.shift = shift

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 (n, H, W), H and W up to 32, into float32 (n, 1, 32, 32)."""
        return self._normalise(self._pad(images))

    def augmented(self, images: Tensor, indices: Tensor, epoch: int | Tensor) -> Tensor:
        """Do the same with augmentation; ``indices`` int64 (n,) are the samples' places in the set."""
        if self.augment == "none":
            return self(images)
        random = hash32(indices, self.seed, epoch)
        images = self._pad(images)
        if self.augment == "flip_shift":
            images = torch.where((random & 1).bool()[:, None, None], images.flip(2), images)
        span = 2 * self.shift + 1
        rows = (random >> 8) % span  # 24 and 12 random bits: hardly biased
        columns = (random >> 20) % span
        return self._normalise(_shift(images, rows, columns, self.shift))

    def _pad(self, images: Tensor) -> Tensor:
        height, width = images.shape[1:]
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        return F.pad(images, (left, SIZE - width - left, top, SIZE - height - top))

    def _normalise(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std).unsqueeze(1)


def measure(images: Tensor) -> tuple[float, float]:
    """Return mean and deviation of uint8 images (N, H, W); of a large set, of 64 evenly spaced parts of 1,024 images.

    A histogram of 256 values makes both exact, however many pixels there are.
    """
    counts = torch.stack([torch.bincount(part.flatten(), minlength=256) for part in _parts(images)]).sum(0).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return float(mean), max(float(variance.sqrt()), 1.0)  # a set of one colour still trains


def _parts(images: Tensor) -> Iterator[Tensor]:
    """Cut a set into parts, and of a large one pick evenly spaced parts, its first and its last among them."""
    last = len(images) - PART
    starts = range(0, len(images), PART) if last < PARTS * PART else (k * last // (PARTS - 1) for k in range(PARTS))
    return (images[start : start + PART] for start in starts)


def _shift(images: Tensor, rows: Tensor, columns: Tensor, most: int) -> Tensor:
    """Move each image of (n, H, W) by (most - rows, most - columns) pixels, filling with zeros."""
    height, width = images.shape[1:]
    padded = F.pad(images, (most, most, most, most))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view: (n, 2 most + 1, 2 most + 1, H, W)
    return windows[torch.arange(len(images), device=images.device), rows, columns]
