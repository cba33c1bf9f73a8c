"""Mixup and CutMix: train on mixtures of two images, the sample and its partner, and of their labels.

Sources: https://arxiv.org/abs/1710.09412 and https://arxiv.org/abs/1905.04899. There, the partner is another sample of
the batch, and a batch has one share. Here, both are functions of the sample's key, so that they do not depend on the
number of ranks.
"""

import numpy as np
import torch
from torch import Tensor

from distlenet.task import SampleKeys
from distlenet.tasks.parts import cached_parts

TABLE_STEPS = 4096  # the distribution function of the shares is exact to 1 / TABLE_STEPS
GRID = 2**15  # points of the numerical integration


class Mixing:
    """Mix images and labels. With both methods, each is applied to half of the samples."""

    def __init__(self, mixup: float, cutmix: float, classes: int) -> None:
        """Take the parameters of the Beta distributions, at least one above 0, and the number of classes."""
        self.tables = {
            name: torch.from_numpy(smaller_share_table(alpha))
            for name, alpha in (("mixup", mixup), ("cutmix", cutmix))
            if alpha > 0
        }
        self.classes = classes

    def __call__(
        self, images: Tensor, labels: Tensor, partners: Tensor, partner_labels: Tensor, keys: SampleKeys
    ) -> tuple[Tensor, Tensor]:
        """Return mixed images and targets, float32 (n, classes), from images (n, C, H, W) and int64 labels (n,).

        The images are mixed in place, and the partners are overwritten. No host sync after the first call on a device.
        """
        height, width = images.shape[-2:]
        mixup = self._share("mixup", keys) if "mixup" in self.tables else None
        cutmix = self._share("cutmix", keys) if "cutmix" in self.tables else None
        share, cut = mixup, None
        if cutmix is not None:
            rows, columns = box_sides(height, width, (1 - cutmix).sqrt(), keys)
            kept = height * width - rows.sum(1) * columns.sum(1)
            share = (kept.double() / (height * width)).float()
            if mixup is not None:
                cut = keys.bernoulli("cutmix instead of mixup", 0.5)
                share = torch.where(cut, share, mixup)
        assert share is not None
        for part in cached_parts(images, (height, width)):
            if cutmix is None:
                weight = share[part].view(-1, 1, 1, 1)
            else:
                weight = (~(rows[part, None, :, None] & columns[part, None, None, :])).float()
                if cut is not None and mixup is not None:
                    weight = torch.where(cut[part].view(-1, 1, 1, 1), weight, mixup[part].view(-1, 1, 1, 1))
            images[part].mul_(weight).add_(partners[part].mul_(1 - weight))
        share = share.unsqueeze(1)
        classes = torch.arange(self.classes, device=labels.device)
        own, other = labels.unsqueeze(1) == classes, partner_labels.unsqueeze(1) == classes
        return images, own * share + other * (1 - share)

    def _share(self, name: str, keys: SampleKeys) -> Tensor:
        """Return numbers with a Beta(alpha, alpha) distribution, float32 (n,)."""
        table = self.tables[name] = self.tables[name].to(keys.indices.device)
        position = keys.uniform(f"{name} share", high=TABLE_STEPS).double()  # exact: 24 bits
        step = position.long()
        part = position - step
        smaller = (table[step] * (1 - part) + table[step + 1] * part).float()
        return torch.where(keys.bernoulli(f"{name} side", 0.5), smaller, 1 - smaller)


def box_sides(height: int, width: int, side: Tensor, keys: SampleKeys) -> tuple[Tensor, Tensor]:
    """Return the rows, bool (n, H), and the columns, bool (n, W), of boxes with random pixels as centers.

    ``side`` (n,) is their share of height and width. A box is clipped at the border of the image.
    """
    inside = []
    for name, length in (("row", height), ("column", width)):
        extent, center = (side * length).long(), keys.integers(f"cutmix {name}", length)
        start = (center - extent // 2).unsqueeze(1)
        pixels = torch.arange(length, device=side.device)
        inside.append((pixels >= start) & (pixels < start + extent.unsqueeze(1)))
    return inside[0], inside[1]


def smaller_share_table(alpha: float) -> np.ndarray:
    """Return quantiles of min(x, 1 - x), x of the distribution Beta(alpha, alpha): float64 (TABLE_STEPS + 1,)."""
    power = min(alpha, 1.0)  # the density of x**power is bounded
    grid = np.linspace(0, 0.5**power, GRID + 1)
    x = grid ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    cumulated = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    quantiles = np.interp(np.linspace(0, 1, TABLE_STEPS + 1), cumulated / cumulated[-1], grid) ** (1 / power)
    return np.round(quantiles * 2**30) / 2**30  # without the last bits of the powers, which differ between machines
