"""Give all images of a data set one size, and keep small sets decoded in memory."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.image_dataset import height_and_width
from distlenet.data.resizing import resize_images, to_tensor
from distlenet.data.sources.opened import EncodedImages, OpenedImages, Split, StoredImages, store_images
from distlenet.images.decoding import resize_image
from distlenet.images.image_format import size_text
from distlenet.utils.errors import UserError

CHUNK_IMAGES = 256  # images resized at a time
MAX_DECODED_BYTES = 2**28  # image files that decode to no more than this are decoded once, into memory
CHECKED_IMAGES = 64  # number of images of a larger set whose sizes are checked before the training


def wanted_size(config: DataConfig) -> tuple[int, int] | None:
    """Return ``data.size`` as (height, width)."""
    size = config.size
    return (size, size) if isinstance(size, int) else (size[0], size[1]) if size else None


def fit_sizes(opened: OpenedImages, config: DataConfig, stack: ExitStack) -> OpenedImages:
    """Resize all images to ``data.size``, if given. Raise UserError if they then differ in shape.

    Image files are decoded into memory, which all ranks of the node share, if they are few; otherwise each image is
    decoded and checked when it is read.
    """
    size = wanted_size(config)
    splits = {name: getattr(opened, name) for name in ("train", "test", "validation")}
    shape = first_shape(splits["train"], size)
    fitted: dict[str, Any] = {name: split and _fit(split, size, shape, stack) for name, split in splits.items()}
    for name, split in fitted.items():
        if isinstance(split, StoredImages) and (split.images.shape[1:] != shape):
            found = f"{name} images of shape {list(split.images.shape[1:])}, but training images of {list(shape)}"
            raise UserError(f"data {opened.source}: has {found}; give data.size=[HEIGHT,WIDTH] to resize all")
    return replace(opened, **fitted)


def first_shape(split: Split, size: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the shape of the first image after resizing."""
    shape = split.images.shape[1:] if isinstance(split, StoredImages) else tuple(to_tensor(split.image(0)).shape)
    return (*shape[:-2], *size) if size else shape


def _fit(
    split: Split, size: tuple[int, int] | None, shape: tuple[int, ...], stack: ExitStack
) -> "StoredImages | ResizedImages":
    if isinstance(split, StoredImages):
        if size is None or split.images.shape[-2:] == size:
            return split
        images, labels = split.images.map(), split.labels.map()
        return store_images((resize_images(part, size) for part in images.split(CHUNK_IMAGES)), labels, stack)
    resized = ResizedImages(split, split.labels, size, shape)
    if len(split) * torch.Size(shape).numel() <= MAX_DECODED_BYTES:
        return store_images((resized[index][0].unsqueeze(0) for index in range(len(split))), split.labels, stack)
    for number in range(CHECKED_IMAGES):
        resized[number * (len(split) - 1) // (CHECKED_IMAGES - 1)]
    return resized


@dataclass(frozen=True)
class ResizedImages:
    """Image files, resized to ``size`` when they are read; each must then have ``shape``."""

    files: EncodedImages
    labels: Tensor
    size: tuple[int, int] | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label. Raise UserError if the image is damaged or of another shape."""
        decoded = self.files.image(index)
        image = to_tensor(resize_image(decoded, self.size) if self.size else decoded)
        if tuple(image.shape) != self.shape:
            first = size_text((self.shape[-2], self.shape[-1]))
            raise UserError(
                f"data {self.name(index)}: has {size_text(height_and_width(image))} pixels, but the first training "
                f"image has {first}; give data.size=N or data.size=[HEIGHT,WIDTH] to resize all images"
            )
        return image.contiguous(), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return how messages call an image."""
        return self.files.name(index)
