"""Checks of labels and shapes that sources of a user's images share, and digests of them."""

import hashlib

import torch
from torch import Tensor

from distlenet.utils.errors import UserError

MAX_CLASSES = 2**20  # larger labels are not classes, but numbers such as ids
DIGEST_PARTS, DIGEST_BYTES = 64, 2**20  # number and size of the parts that the digest of a large tensor contains


def check_images(name: str, images: Tensor) -> None:
    """Raise UserError unless images are uint8 or finite floating point, (N, H, W) or (N, C, H, W), and at least one."""
    shape = list(images.shape)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"data {name}: is of type {str(images.dtype)[6:]}; expected uint8 or floating point")
    if images.dim() not in (3, 4) or 0 in shape:
        raise UserError(f"data {name}: has shape {shape}; expected (images, height, width), or with channels second")
    if images.dim() == 4 and shape[3] <= 4 < shape[1]:
        raise UserError(f"data {name}: has shape {shape}, channels last; store it as numpy.transpose(x, (0, 3, 1, 2))")
    if images.is_floating_point() and not torch.stack(images.aminmax()).isfinite().all():
        index = next(index for index, image in enumerate(images) if not image.isfinite().all())
        raise UserError(f"data {name}: image {index} has values that are not finite; correct or remove it")


def check_labels(name: str, labels: Tensor, images: int, classes: int | None = None) -> None:
    """Raise UserError unless labels are integers (N,), one per image, from 0 to ``classes`` - 1."""
    if labels.is_floating_point() or labels.dtype == torch.bool or list(labels.shape) != [images]:
        found = f"{str(labels.dtype)[6:]} of shape {list(labels.shape)}"
        raise UserError(f"data {name}: is {found}; expected one integer for each of the {images:,} images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= (classes or MAX_CLASSES):
        limit = f" to {classes - 1}, the labels of the training set" if classes else f", below {MAX_CLASSES:,}"
        raise UserError(f"data {name}: has labels from {low} to {high}; expected integers from 0{limit}")


def digest_of(*tensors: Tensor) -> str:
    """Return 16 hex digits that depend on shapes, types and bytes; of a large tensor, on evenly spaced parts."""
    digest = hashlib.sha256()
    for tensor in tensors:
        content = tensor.contiguous().view(-1).view(torch.uint8)
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        last = len(content) - DIGEST_BYTES
        starts = [k * last // (DIGEST_PARTS - 1) for k in range(DIGEST_PARTS)]
        if last < DIGEST_PARTS * DIGEST_BYTES:
            starts = list(range(0, len(content), DIGEST_BYTES))
        for start in starts:
            digest.update(content[start : start + DIGEST_BYTES].numpy().data)
    return digest.hexdigest()[:16]
