"""Resize images: the same way for training, evaluation and prediction."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 or floating-point images, (..., H, W), to ``size`` bilinearly, with antialiasing.

    The computation is in float32, because the kernels for uint8 differ between processors; uint8 is rounded. Each image
    gives the same result alone and in a batch, and in any order of its bytes. The result is contiguous.
    """
    if tuple(images.shape[-2:]) == size:
        return images.contiguous()
    # The colors of one decoded image are next to each other: no copy, and the kernel is faster.
    planes = images.unsqueeze(0) if images.dim() == 3 else images.reshape(-1, 1, *images.shape[-2:])
    resized = interpolate(planes.float(), size, mode="bilinear", antialias=True)  # as torchvision does
    if images.dtype == torch.uint8:
        resized = resized.round_().clamp_(0, 255)
    return resized.to(images.dtype).reshape(*images.shape[:-2], *size).contiguous()
