"""The random changes of images that ``data.crop``, ``data.flip``, the color settings and ``data.erase`` select."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.images.decoding import COLOR, GREY
from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.boxes import BOX_DRAWS
from distlenet.tasks.color_jitter import LIGHT, ColorJitter
from distlenet.tasks.cropping import Cropping, Taps, resample
from distlenet.tasks.erasing import Erasing, Mask
from distlenet.utils.errors import UserError

FLIP, ERASE, COLORS, CROP_BOX = 0, 1, slice(2, 6), slice(6, 6 + BOX_DRAWS)
ERASE_BOX = slice(CROP_BOX.stop, CROP_BOX.stop + BOX_DRAWS)
"""The places of the random numbers of a sample, the same whatever is selected. One call draws all: few kernels."""


class Plan(NamedTuple):
    """What happens to each of n images: tensors (n, ...); None leaves a change out."""

    crop: Taps | None = None
    flip: Tensor | None = None  # bool (n,); None also if ``crop`` mirrors
    colors: Tensor | None = None  # (n, 4)
    erase: Mask | None = None

    def select(self, part: slice) -> "Plan":
        """Return the plan of some images."""
        return Plan(
            None if self.crop is None else Taps(*(tensor[part] for tensor in self.crop)),
            None if self.flip is None else self.flip[part],
            None if self.colors is None else self.colors[part],
            None if self.erase is None else Mask(*(tensor[part] for tensor in self.erase)),
        )


@dataclass(frozen=True)
class Augmentation:
    """The selected changes; None and 0 leave one out."""

    crop: Cropping | None = None
    flip: float = 0.0
    colors: ColorJitter | None = None
    erase: Erasing | None = None

    def plan(self, images: Tensor, size: tuple[int, int], keys: SampleKeys | None) -> Plan:
        """Return what happens to images (n, C, H, W) and, after their normalisation, to those of ``size``.

        All random numbers are of ``keys``; without keys only the center is cropped. No host sync.
        """
        if keys is None:
            return Plan(None if self.crop is None else self.crop.taps(None, images, None))
        draws = keys.uniform("augmentation", (ERASE_BOX.stop,))
        flip = draws[:, FLIP] < self.flip if self.flip else None
        return Plan(
            None if self.crop is None else self.crop.taps(draws[:, CROP_BOX], images, flip),
            flip if self.crop is None else None,
            None if self.colors is None else draws[:, COLORS],
            None if self.erase is None else self.erase.mask(draws[:, ERASE], draws[:, ERASE_BOX], size),
        )

    def change(self, images: Tensor, plan: Plan) -> Tensor:
        """Crop, flip and change the colors of images (n, C, H, W).

        Return a new tensor, float32 after a crop or other colors, or ``images`` if nothing happens.
        """
        if plan.crop is not None:
            images = resample(images, plan.crop)
        if plan.flip is not None:
            images = torch.where(plan.flip.view(-1, 1, 1, 1), images.flip(-1), images)
        if plan.colors is None or self.colors is None:
            return images
        return self.colors(images.to(torch.float32, copy=plan.crop is None), plan.colors)

    def check(self, images: ImageFormat) -> None:
        """Raise UserError if the colors of the images cannot be changed as selected."""
        chosen = {} if self.colors is None else {name: value for name, value in vars(self.colors).items() if value}
        for name, value in chosen.items():
            if (images.low, images.high) != (0.0, LIGHT):
                raise UserError(
                    f"data.{name}={value:g}: needs uint8 images, but these have values from {images.low:g} to "
                    f"{images.high:g}; store them as uint8, or remove data.{name}"
                )
            accepted = {"saturation": (COLOR,), "hue": (COLOR,), "contrast": (GREY, COLOR)}.get(name)
            if accepted and images.channels not in accepted:
                found = "grey" if images.channels == GREY else f"of {images.channels} channels"
                raise UserError(f"data.{name}={value:g}: not for images that are {found}; remove it")


def make_augmentation(config: DataConfig) -> Augmentation | None:
    """Return the changes that the settings select, or None."""
    crop, erase = None, None
    if config.crop is not None:
        height, width = [config.crop] * 2 if isinstance(config.crop, int) else config.crop
        crop = Cropping((height, width), _pair(config.crop_scale), _pair(config.crop_ratio), config.crop_center)
    if config.erase:
        erase = Erasing(config.erase, _pair(config.erase_scale), _pair(config.erase_ratio))
    jitter = ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    augmentation = Augmentation(crop, config.flip, None if jitter == ColorJitter() else jitter, erase)
    return None if augmentation == Augmentation() else augmentation


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]
