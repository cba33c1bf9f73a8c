"""Resize images: the same way for training, evaluation and prediction."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image of mode L or RGB to ``size``, (height, width), bilinearly, with antialiasing.

    Pillow computes in integers: the result is the same on every processor.
    """
    return image if image.size == size[::-1] else image.resize(size[::-1], Image.Resampling.BILINEAR)


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 or floating-point images, (..., H, W), to ``size`` bilinearly, with antialiasing.

    uint8 is resized as by ``resize_image``, floating point in float32. The result for an image depends neither on the
    other images nor on the memory format. It is contiguous.
    """
    if tuple(images.shape[-2:]) == size:
        return images.contiguous()
    planes = images.reshape(-1, 1, *images.shape[-2:])
    if images.dtype == torch.uint8:
        resized = torch.empty((len(planes), *size), dtype=torch.uint8)
        for plane, result in zip(planes[:, 0].numpy(), resized, strict=True):
            result.copy_(torch.from_numpy(np.array(resize_image(Image.fromarray(plane), size))))
    else:
        resized = interpolate(planes.float(), size, mode="bilinear", antialias=True).to(images.dtype)
    return resized.reshape(*images.shape[:-2], *size)
