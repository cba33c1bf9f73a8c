"""Parts of a batch that the CPU computes together."""

import torch
from torch import Tensor

CACHED_BYTES = 2**20  # of float32 images: then the operations on a part find it in the cache


def cached_parts(images: Tensor, size: tuple[int, int]) -> list[slice]:
    """Return slices of the n images (n, C, H, W) that become float32 images of ``size``: one on a GPU.

    Also one in an exported network, whose n is not known.
    """
    count = images.shape[0]
    if images.device.type != "cpu" or torch.compiler.is_exporting():
        return [slice(0, count)]
    together = max(1, CACHED_BYTES // (4 * images.shape[1] * size[0] * size[1]))
    return [slice(start, start + together) for start in range(0, count, together)]
