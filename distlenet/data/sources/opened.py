"""What a source of images returns: splits that one process of a node opens and all its ranks map."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.image_dataset import ImageDataset
from distlenet.utils.mapped_file import TensorRef, share_tensors


@dataclass(frozen=True)
class StoredImages:
    """Images of one size as a tensor in a file: uint8 or floating point, (N, H, W) or (N, C, H, W); labels (N,)."""

    images: TensorRef
    labels: TensorRef
    sampled: bool = False

    def map(self) -> ImageDataset:
        """Return the dataset, without a copy. Raise OSError if the files are not visible to this process."""
        return ImageDataset(self.images.map(), self.labels.map(), sampled=self.sampled)


class EncodedImages(Protocol):
    """Image files, each of which is decoded when it is read. They can be sent to other ranks."""

    @property
    def labels(self) -> Tensor:
        """The labels, int64 (N,)."""

    def __len__(self) -> int:
        """Return the number of images."""

    def image(self, index: int) -> Image.Image:
        """Return an image of mode L or RGB. Raise UserError if it cannot be decoded."""

    def name(self, index: int) -> str:
        """Return how messages call an image."""


class ImageFiles(EncodedImages, Protocol):
    """Image files as a source returns them."""

    channels: int

    @property
    def file_bytes(self) -> int:
        """The size of all image files."""

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return name, size and modification time of files: if one may have changed, its stamp is another."""


Split = StoredImages | EncodedImages


@dataclass(frozen=True)
class OpenedImages:
    """The splits of a data set. Everything that other ranks of the node need to map it, as picklable values."""

    source: str  # the origin of the images, for messages
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None = None
    fingerprint: Mapping[str, str] = field(default_factory=dict)


Source = Callable[[DataConfig, ExitStack, bool], OpenedImages]
"""Opens a data set. The stack closes its files; the flag allows downloads by every way, into any ``data.root``.

Raises UserError if the data is unavailable or damaged.
"""


def store_images(parts: Iterable[Tensor], labels: Tensor, stack: ExitStack) -> StoredImages:
    """Copy parts of a set, (n, ...) each, and its labels (N,) to memory that all ranks of the node can map.

    ``stack`` closes its files.
    """
    image_file, image_ref = share_tensors(parts, len(labels))
    stack.enter_context(closing(image_file))
    label_file, label_ref = share_tensors([labels], len(labels))
    stack.enter_context(closing(label_file))
    return StoredImages(image_ref, label_ref)
