"""Datasets of a user's function: map-style datasets whose samples are (image, label), as images of one shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.image_dataset import height_and_width
from distlenet.data.resizing import resize_images, to_tensor
from distlenet.data.sources.custom_cache import cache_samples
from distlenet.data.sources.sizing import wanted_size
from distlenet.data.validation import split_validation
from distlenet.distributed.collectives import has_process_group, raise_on_all_ranks
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.images.decoding import channels_of, convert
from distlenet.images.image_format import size_text
from distlenet.task import Datasets
from distlenet.utils.errors import UserError, warn


@dataclass(frozen=True)
class SampleImages:
    """Samples (image, label) of a user's dataset, with the image as a tensor of ``shape`` and type ``dtype``."""

    dataset: Any
    name: str
    size: tuple[int, int] | None
    shape: tuple[int, ...] | None = None  # None: any
    dtype: torch.dtype | None = None
    classes: int | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, uint8 or floating point, (H, W) or (C, H, W), and its label.

        Raise UserError if the sample is not one, or differs in shape or type from the first of the training set.
        """
        sample, place = self.dataset[index], f"{self.name}, sample {index}"
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise UserError(f"{place}: is a {type(sample).__name__}; expected a tuple (image, label)")
        image, label = _to_image(sample[0], place), _to_label(sample[1], place, self.classes)
        image = resize_images(image, self.size) if self.size is not None else image.contiguous()
        if self.shape is not None and (tuple(image.shape), image.dtype) != (self.shape, self.dtype):
            if image.shape[-2:] != self.shape[-2:]:
                found, first = size_text(height_and_width(image)), size_text((self.shape[-2], self.shape[-1]))
                raise UserError(f"{place}: has {found} pixels, but the first sample has {first}; give data.size=N")
            raise UserError(
                f"{place}: is {image.dtype} of shape {list(image.shape)}, but the first sample is {self.dtype} of "
                f"{list(self.shape)}; return images of one kind"
            )
        return image, label


def load_custom(
    function: Callable[..., Datasets],
    args: Mapping[str, Any],
    config: DataConfig,
    env: DistributedEnvironment,
) -> Datasets:
    """Return the datasets of ``function(**args)``, with images of one shape. A collective, if there is a group.

    Local rank 0 calls the function first, so that the others find what it downloads. Samples of datasets that declare
    ``deterministic = True`` are cached, if their images are uint8.
    """
    datasets: Any = None
    if has_process_group():
        with raise_on_all_ranks():
            if env.local_rank == 0:
                datasets = function(**args)
    datasets = function(**args) if datasets is None else datasets
    name = f"data.name={config.name}"
    if not isinstance(datasets, Datasets):
        raise UserError(f"{name}: returned a {type(datasets).__name__}; expected distlenet.Datasets")
    size, classes = wanted_size(config), len(datasets.classes) if datasets.classes else None
    first = SampleImages(datasets.train, f"{name}, training set", size)[0][0]

    def wrap(dataset: Any, split: str) -> SampleImages:
        return SampleImages(dataset, f"{name}, {split} set", size, tuple(first.shape), first.dtype, classes)

    named = {"train": "training", "test": "test", "validation": "validation"}
    given = {split: getattr(datasets, split) for split in named if getattr(datasets, split) is not None}
    wrapped: Mapping[str, Any] = {split: wrap(dataset, named[split]) for split, dataset in given.items()}
    declared = all(getattr(dataset, "deterministic", False) is True for dataset in given.values())
    if config.cache != "off" and declared and first.dtype != torch.uint8 and env.rank == 0:
        warn(f"{name}: declares deterministic = True, but its images are {first.dtype}: only uint8 images are cached")
    elif config.cache != "off" and declared and first.dtype == torch.uint8:
        wrapped = cache_samples(wrapped, datasets.fingerprint, config, env)
    result = replace(datasets, source=datasets.source or config.name, **wrapped)
    return split_validation(result, config.validation)


def _to_image(image: Any, place: str) -> Tensor:
    if isinstance(image, Image.Image):
        return to_tensor(convert(image, channels_of(image)))
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        found = f"a tensor of shape {list(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise UserError(f"{place}: the image is {found}; expected a PIL image, or a tensor (H, W) or (C, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"{place}: the image is of type {image.dtype}; expected uint8 or floating point")
    return image.as_subclass(Tensor)  # torchvision's Image is a subclass


def _to_label(label: Any, place: str, classes: int | None) -> int:
    try:
        value = int(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: the label is a {type(label).__name__}; expected an integer from 0") from error
    if value != label or value < 0 or (classes is not None and value >= classes):
        limit = f" to {classes - 1}, one per class" if classes is not None else ""
        raise UserError(f"{place}: the label is {label}; expected an integer from 0{limit}")
    return value
