"""Images in memory, and the check of a sample's image."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

COPIED_IMAGES = 1024  # at a time


@dataclass(frozen=True)
class ImageDataset:
    """Images in memory, uint8 or floating point, (N, H, W) or (N, C, H, W), and their labels (N,) of an integer type.

    ``rows``, int64 (n,), selects some of them; without it n is N. ``sampled`` marks a large set of image files, whose
    mean and standard deviation are those of samples, whether it is cached or not.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor | None = None
    sampled: bool = False

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image, (H, W) or (C, H, W), and its label."""
        row = index if self.rows is None else int(self.rows[index])
        return self.images[row], int(self.labels[row])

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the labels, as int64, of ``indices``: int64 (n,) on the device of the images."""
        if self.rows is not None:
            indices = self.rows.index_select(0, indices)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices).long()

    @property
    def device(self) -> torch.device:
        """The device of the images."""
        return self.images.device

    def select(self, rows: Tensor) -> "ImageDataset":
        """Return the samples ``rows``, int64 (n,), without a copy."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    @property
    def nbytes(self) -> int:
        """Number of bytes of the selected images and labels."""
        return len(self) * (self.images[:1].nbytes + self.labels[:1].nbytes)

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the selected samples on ``device``."""
        if self.rows is None:
            return replace(self, images=self.images.to(device), labels=self.labels.to(device))
        images = torch.empty((len(self.rows), *self.images.shape[1:]), dtype=self.images.dtype, device=device)
        for copied, rows in zip(images.split(COPIED_IMAGES), self.rows.split(COPIED_IMAGES), strict=True):
            copied.copy_(self.images[rows])  # in parts: all ranks of a node may do it, each with a copy of its rows
        return ImageDataset(images, self.labels[self.rows].to(device), sampled=self.sampled)


def height_and_width(image: Tensor) -> tuple[int, int]:
    """Return the last two dimensions of an image or of a batch of images."""
    return image.shape[-2], image.shape[-1]
