"""From stored images to network input, vectorised over a batch, on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.augmentation import Augmentation, Plan
from distlenet.tasks.parts import cached_parts


class ImageTransform:
    """Crop, change, pad to the input size of the network, shift, normalise by the training set's statistics, erase.

    Padding and normalisation are always done, the others with settings. Random changes are made only in training.
    """

    def __init__(
        self,
        images: ImageFormat,
        input_size: tuple[int, int] | None,
        augment: str,
        max_shift: int,
        augmentation: Augmentation | None,
    ) -> None:
        """Take the format of the images. ``input_size`` is at least their size, cropped; None: no padding.

        ``augment`` is none, shift or flip_shift; ``max_shift`` is in pixels.
        """
        size = augmentation.crop.size if augmentation and augmentation.crop else images.size
        self.images, self.input_size = images, input_size or size
        self.augment, self.max_shift, self.augmentation = augment, max_shift, augmentation
        self.statistics = torch.tensor([images.mean, images.std], dtype=torch.float32)[:, :, None, None]  # (2, C, 1, 1)

    def __call__(self, images: Tensor, keys: SampleKeys | None = None) -> Tensor:
        """Turn uint8 or floating-point images, (n, H, W) or (n, C, H, W), into float32 (n, C, height, width).

        Augment only with ``keys``. No host sync after the first call on a device.
        """
        bits = None if keys is None or self.augment == "none" else keys.bits()
        if self.augmentation is None:
            return self._transform(images, bits, None)
        images = images.unsqueeze(1) if images.dim() == 3 else images
        plan = self.augmentation.plan(images, self.input_size, keys)
        parts = cached_parts(images, self.input_size)
        if len(parts) <= 1:
            return self._transform(images, bits, plan)
        result = torch.empty(len(images), images.shape[1], *self.input_size)
        for part in parts:
            result[part] = self._transform(images[part], None if bits is None else bits[part], plan.select(part))
        return result

    def _transform(self, images: Tensor, bits: Tensor | None, plan: Plan | None) -> Tensor:
        original = images
        if self.augmentation is not None and plan is not None:
            images = self.augmentation.change(images, plan)
        images = _pad(images, self.input_size)
        if bits is not None:
            images = self._augment(images, bits)
        values = images.to(torch.float32, copy=images is original)  # exact for uint8; stored images stay as they are
        if self.images.channels == 1:  # plain numbers: dividing by a tensor differs in the last bits on a GPU
            values.sub_(self.images.mean[0]).div_(self.images.std[0])
        else:
            if self.statistics.device != values.device:  # no assignment while torch.export traces
                self.statistics = self.statistics.to(values.device)
            values.sub_(self.statistics[0]).div_(self.statistics[1])
        if plan is not None and plan.erase is not None:
            values = plan.erase.erase(values)
        return values.unsqueeze(1) if values.dim() == 3 else values

    def _augment(self, images: Tensor, bits: Tensor) -> Tensor:
        if self.augment == "flip_shift":
            flipped = (bits & 1).bool().view(-1, *[1] * (images.dim() - 1))
            images = torch.where(flipped, images.flip(-1), images)
        span = 2 * self.max_shift + 1
        rows = (bits >> 8) % span  # the remainders of 24 and 12 random bits: nearly uniform
        columns = (bits >> 20) % span
        return _shift(images, rows, columns, self.max_shift)


def _pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Add zeros around images to the given height and width; return ``images`` if they have it."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return F.pad(images, (left, size[1] - width - left, top, size[0] - height - top))


def _shift(images: Tensor, rows: Tensor, columns: Tensor, limit: int) -> Tensor:
    """Move each image of (n, H, W) or (n, C, H, W) by (limit - rows, limit - columns) pixels, filling with zeros."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (limit, limit, limit, limit))
    windows = padded.unfold(-2, height, 1).unfold(-2, width, 1)  # a view: (n, [C,] 2 limit + 1, 2 limit + 1, H, W)
    if images.dim() == 4:
        windows = windows.movedim(1, 3)
    return windows[torch.arange(len(images), device=images.device), rows, columns]
