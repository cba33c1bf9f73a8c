"""Mixup and CutMix: train on mixtures of two images, the sample and its partner, and of their labels.

Sources: https://arxiv.org/abs/1710.09412 and https://arxiv.org/abs/1905.04899. There, the partner is another sample of
the batch, and a batch has one share. Here, both are functions of the sample's key, so that they do not depend on the
number of ranks.
"""

import numpy as np
import torch
from torch import Tensor

from distlenet.task import SampleKeys

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

        No host sync after the first call on a device.
        """
        weights = [self._weights(name, images, keys) for name in self.tables]
        weight, share = weights[0]
        if len(weights) == 2:
            cut = keys.bernoulli("cutmix instead of mixup", 0.5)
            weight = torch.where(cut.view(-1, 1, 1), weights[1][0], weight)
            share = torch.where(cut, weights[1][1], share)
        weight, share = weight.unsqueeze(1), share.unsqueeze(1)
        classes = torch.arange(self.classes, device=labels.device)
        own, other = labels.unsqueeze(1) == classes, partner_labels.unsqueeze(1) == classes
        return images * weight + partners * (1 - weight), own * share + other * (1 - share)

    def _weights(self, name: str, images: Tensor, keys: SampleKeys) -> tuple[Tensor, Tensor]:
        """Return the weight of each pixel of the sample, (n, H, W) or (n, 1, 1), and its mean (n,), both float32."""
        share = self._share(name, keys)
        if name == "mixup":
            return share.view(-1, 1, 1), share
        mask = ~boxes(images.shape[-2], images.shape[-1], (1 - share).sqrt(), keys)
        return mask.float(), mask.double().mean((1, 2)).float()

    def _share(self, name: str, keys: SampleKeys) -> Tensor:
        """Return numbers with a Beta(alpha, alpha) distribution, float32 (n,)."""
        table = self.tables[name] = self.tables[name].to(keys.indices.device)
        position = keys.uniform(f"{name} share", high=TABLE_STEPS).double()  # exact: 24 bits
        step = position.long()
        part = position - step
        smaller = (table[step] * (1 - part) + table[step + 1] * part).float()
        return torch.where(keys.bernoulli(f"{name} side", 0.5), smaller, 1 - smaller)


def boxes(height: int, width: int, side: Tensor, keys: SampleKeys) -> Tensor:
    """Return boxes as bool (n, H, W): ``side`` (n,) is the share of height and width, random pixels are the centers.

    A box is clipped at the border of the image.
    """
    inside = []
    for name, length in (("row", height), ("column", width)):
        extent, center = (side * length).long(), keys.integers(f"cutmix {name}", length)
        start = (center - extent // 2).unsqueeze(1)
        pixels = torch.arange(length, device=side.device)
        inside.append((pixels >= start) & (pixels < start + extent.unsqueeze(1)))
    return inside[0].unsqueeze(2) & inside[1].unsqueeze(1)


def smaller_share_table(alpha: float) -> np.ndarray:
    """Return quantiles of min(x, 1 - x), x of the distribution Beta(alpha, alpha): float64 (TABLE_STEPS + 1,)."""
    power = min(alpha, 1.0)  # the density of x**power is bounded
    grid = np.linspace(0, 0.5**power, GRID + 1)
    x = grid ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    cumulated = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    quantiles = np.interp(np.linspace(0, 1, TABLE_STEPS + 1), cumulated / cumulated[-1], grid) ** (1 / power)
    return np.round(quantiles * 2**30) / 2**30  # without the last bits of the powers, which differ between machines
