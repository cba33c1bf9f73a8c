"""Random brightness, contrast, saturation and hue of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

LIGHT = 255.0  # the largest value of uint8 images
SMALLEST = 1e-6


@dataclass(frozen=True)
class ColorJitter:
    """Change the colors of each image as ColorJitter of torchvision.transforms.v2, with other factors for each.

    The factors of brightness, contrast and saturation are uniform in [max(0, 1 - value), 1 + value], the rotation of
    the hue is uniform in [-hue, hue]. Each step is that of v2 for float images; for uint8 images v2 rounds down after
    each. v2 applies the four in a random order, here it is fixed: brightness, contrast, saturation, hue. The order of
    the first three has an influence only on values that are clipped in between.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change float32 images (n, C, H, W) with values from 0 to 255 in place, and return them.

        ``draws`` are float32 (n, 4) in [0, 1). Saturation and hue need three channels, contrast one or three. No host
        sync. No fused products and sums: on some processors, they differ in the last bits at the end of a row.
        """
        brightness, contrast, saturation, hue = draws.view(-1, 4, 1, 1, 1).unbind(1)
        if self.brightness:
            images.mul_(_factor(brightness, self.brightness)).clamp_(0, LIGHT)
        if self.contrast:
            factor = _factor(contrast, self.contrast)
            mean = _mean(_grey(images)).mul_(1 - factor)
            images.mul_(factor).add_(mean).clamp_(0, LIGHT)
        if self.saturation:
            factor = _factor(saturation, self.saturation)
            grey = _grey(images).mul_(1 - factor)
            images.mul_(factor).add_(grey).clamp_(0, LIGHT)
        if self.hue:
            _rotate_hue(images, (hue * 2 - 1).mul_(6 * self.hue))
        return images


def _factor(draws: Tensor, change: float) -> Tensor:
    low, high = max(0.0, 1 - change), 1 + change
    return draws * (high - low) + low


def _grey(images: Tensor) -> Tensor:
    """Return the grey values of images, (n, 1, H, W): a new tensor if they have three channels."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, 1)
    grey: Tensor = (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)
    return grey


def _mean(grey: Tensor) -> Tensor:
    """Return the mean of each image, (n, 1, 1, 1), after rounding to 1/256 (coarser for rows of more than 256 pixels).

    The sums are of integers, which float32 holds exactly for a row: they depend on no order, device or batch.
    """
    height, width = grey.shape[-2:]
    steps = 1 << (16 - min(14, max(8, (width - 1).bit_length())))  # width × 255 × steps is at most 2**24
    sums = (grey * steps).round_().sum(3).double().sum((1, 2))
    return (sums / (steps * height * width)).float().view(-1, 1, 1, 1)


def _rotate_hue(images: Tensor, turn: Tensor) -> None:
    """Add ``turn`` (n, 1, 1, 1), in sixths of a full turn, to the hue in HSV of images, in place."""
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    by_blue, by_green = (red - green).add_(chroma * 4), (blue - red).add_(chroma * 2)
    hue = torch.where(value == red, green - blue, torch.where(value == green, by_green, by_blue))
    hue.div_(chroma.clamp_min(SMALLEST)).add_(turn)
    for channel, offset in ((red, 5), (green, 3), (blue, 1)):
        position = hue + offset
        position.sub_((position * (1 / 6)).floor_().mul_(6))
        share = torch.minimum(position, 4 - position).clamp_(0, 1)
        torch.sub(value, share.mul_(chroma), out=channel)
