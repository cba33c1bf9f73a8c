"""Images as tensors: from Pillow, and resized as by ``images.decoding.resize_image``."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from distlenet.images.decoding import resize_image


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image of mode L or RGB as uint8 (H, W) or (3, H, W), the latter not contiguous."""
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.dim() == 2 else pixels.permute(2, 0, 1)


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
