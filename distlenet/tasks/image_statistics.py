"""Measure the format of the training images."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distlenet.data.image_dataset import ImageDataset
from distlenet.data.seeding import EVALUATION_EPOCH, load_samples
from distlenet.data.validation import Subset
from distlenet.images.decoding import GREY
from distlenet.images.image_format import ImageFormat
from distlenet.task import BatchDataset, MapDataset
from distlenet.utils.errors import UserError
from distlenet.utils.sample_keys import SampleKeys

SAMPLED_PARTS, PART_SIZE = 64, 1024  # number of parts of a large set in memory that are measured, and their images
SAMPLED_FILES = 2048  # number of images of another large set that are measured
DARK = 127  # the largest value of a dark border, for uint8


def measure_images(dataset: MapDataset | BatchDataset, resized: bool = False) -> ImageFormat:
    """Return the format of a training set of (image, label), uint8 or floating point, (H, W) or (C, H, W).

    Mean and standard deviation per channel are computed from a histogram of the 256 values for uint8, which is exact,
    and in float64 for floating point. A large set is measured on evenly spaced images, from the first to the last.
    """
    counts: Tensor | None = None
    moments: list[Tensor] = []
    dark = total = pixels = 0
    low, high = math.inf, -math.inf
    for part in _parts(dataset):
        planes = part.unsqueeze(1) if part.dim() == 3 else part  # (n, C, H, W)
        if part.dtype == torch.uint8:
            histogram = torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in planes.unbind(1)])
            counts = histogram if counts is None else counts + histogram
            border = torch.cat([planes[:, :, 0], planes[:, :, -1], planes[..., 0], planes[..., -1]], -1)[:64, 0]
            dark, total = dark + int((border.median(1).values <= DARK).sum()), total + len(border)
        else:
            values = planes.double()
            moments.append(torch.stack([values.sum((2, 3)), (values**2).sum((2, 3))]))  # (2, n, C)
            pixels += len(planes) * planes[0, 0].numel()
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    size = (planes.shape[2], planes.shape[3])
    if counts is not None:
        mean, std = zip(*map(_mean_and_std, counts), strict=True)
        is_dark = planes.shape[1] == GREY and dark >= 0.9 * total
        return ImageFormat(planes.shape[1], size, resized, mean, std, 0.0, 255.0, is_dark)
    mean, std = zip(
        *(_mean_and_std_of_moments(channel, pixels) for channel in torch.cat(moments, 1).unbind(2)), strict=True
    )
    return ImageFormat(planes.shape[1], size, resized, mean, std, low, max(high, low + 1e-6), False)


def _mean_and_std(counts: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation, at least 1, of uint8 values by their numbers, int64 (256,)."""
    counts, values = counts.double(), torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / counts.sum()
    return float(mean), max(float(variance.sqrt()), 1.0)  # a set of a single color can still be trained on


def _mean_and_std_of_moments(sums: Tensor, pixels: int) -> tuple[float, float]:
    """Return mean and standard deviation from the sums of values and of squares of each image, float64 (2, n)."""
    mean, squares = (math.fsum(row) / pixels for row in sums.tolist())
    variance = max(squares - mean * mean, 0.0)
    return mean, math.sqrt(variance) if variance > 1e-12 * max(squares, 1e-300) else 1.0


def _parts(dataset: MapDataset | BatchDataset) -> Iterator[Tensor]:
    """Yield all images in parts, (n, H, W) or (n, C, H, W), or evenly spaced ones of a large set."""
    count = len(dataset)
    if not isinstance(dataset, ImageDataset) or dataset.sampled:
        wanted = min(count, SAMPLED_FILES)
        rows = [k * (count - 1) // max(wanted - 1, 1) for k in range(wanted)]
        for row in rows:  # seeded: a random transform gives the same statistics in every start of a run
            ((image, _),) = load_samples(dataset, SampleKeys(0, EVALUATION_EPOCH, torch.tensor([row])))  # type: ignore[arg-type]
            if image.is_floating_point() and not image.isfinite().all():
                source, index = (
                    (dataset.dataset, int(dataset.rows[row])) if isinstance(dataset, Subset) else (dataset, row)
                )
                name = getattr(source, "name", "training set")
                raise UserError(f"{name}, sample {index}: has values that are not finite; correct or remove it")
            yield image.unsqueeze(0)
        return
    last = count - PART_SIZE
    starts: Sequence[int] = range(0, count, PART_SIZE)
    if last >= SAMPLED_PARTS * PART_SIZE:
        starts = [k * last // (SAMPLED_PARTS - 1) for k in range(SAMPLED_PARTS)]
    for start in starts:
        rows_or_slice = slice(start, start + PART_SIZE)
        yield dataset.images[rows_or_slice if dataset.rows is None else dataset.rows[rows_or_slice]]
