"""Images per second of random transforms: of a batch by distlenet, and by torchvision.transforms.v2 per sample.

``python benchmarks/augmentation.py [--images 128] [--rounds 9]``: uint8 color images in memory become normalised
float32 batches, on one CPU thread. The contestants take turns; medians and ranges over the rounds. "v2, whole batch"
calls the same v2 transforms once for the batch: all its samples then have the same random numbers, so it is only a
reference.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2

from distlenet.config.loading import load_config
from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.augmentation import make_augmentation
from distlenet.tasks.image_transform import ImageTransform
from distlenet.tasks.mixing import Mixing

CLASSES = 10
SIZES = ((72, 64), (256, 224))  # of the stored images, and of the crops
MEAN, STD = 120.0, 60.0
COLORS = ("data.brightness=0.4", "data.contrast=0.4", "data.saturation=0.4")
CHANGES: dict[str, tuple[str, ...]] = {
    "crop, flip": (),
    "crop, flip, colors, erase": (*COLORS, "data.erase=0.25"),
    "crop, flip, colors with hue, erase": (*COLORS, "data.hue=0.1", "data.erase=0.25"),
    "crop, flip, Mixup or CutMix": ("data.mixup=0.2", "data.cutmix=1"),
}


def ours(images: Tensor, crop: int, settings: tuple[str, ...]) -> Callable[[], Tensor]:
    """Return what makes a batch: the transform of the images, and of their partners if they are mixed."""
    data = load_config([], [f"data.crop={crop}", "data.flip=0.5", *settings]).data
    statistics = (MEAN,) * 3, (STD,) * 3
    stored = ImageFormat(3, (images.shape[-2], images.shape[-1]), False, *statistics, 0.0, 255.0, False)
    transform = ImageTransform(stored, None, "none", 0, make_augmentation(data))
    mixing = Mixing(data.mixup, data.cutmix, CLASSES) if data.mixup else None
    keys, labels = SampleKeys(0, 0, torch.arange(len(images))), torch.arange(len(images)) % CLASSES

    def batch() -> Tensor:
        inputs = transform(images, keys)
        if mixing is None:
            return inputs
        return mixing(inputs, labels, transform(images, keys.split("partner")), labels, keys)[0]

    return batch


def theirs(images: Tensor, crop: int, settings: tuple[str, ...], whole: bool) -> Callable[[], Tensor]:
    """Return what makes a batch, by the same changes as transforms of torchvision, in the same order."""
    data = load_config([], settings).data
    changes = [v2.RandomResizedCrop(crop), v2.RandomHorizontalFlip()]
    if data.brightness:
        changes.append(v2.ColorJitter(data.brightness, data.contrast, data.saturation, data.hue))
    changes += [v2.ToDtype(torch.float32), v2.Normalize([MEAN] * 3, [STD] * 3)]
    transform = v2.Compose([*changes, v2.RandomErasing(data.erase)] if data.erase else changes)
    mixers = v2.MixUp(alpha=data.mixup or 1, num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)
    mix, labels = v2.RandomChoice(mixers), torch.arange(len(images)) % CLASSES

    def batch() -> Tensor:
        inputs = transform(images) if whole else torch.stack([transform(image) for image in images])
        return mix(inputs, labels)[0] if data.mixup else inputs

    return batch


def contestants(images: Tensor, crop: int, settings: tuple[str, ...]) -> dict[str, Callable[[], Tensor]]:
    """Return what to time, by name: each call makes one batch."""
    return {
        "distlenet": ours(images, crop, settings),
        "v2, per sample": theirs(images, crop, settings, whole=False),
        "v2, whole batch": theirs(images, crop, settings, whole=True),
    }


def measure(makers: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each contestant in each round, after one round to warm up."""
    speeds: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(rounds + 1):
        for name, make in makers.items():
            started = time.perf_counter()
            count = len(make())
            if number:
                speeds[name].append(count / (time.perf_counter() - started))
    return speeds


def rows(images: int, rounds: int) -> Iterator[str]:
    """Yield table rows: the median and the range of the speeds, and of the ratio to v2 per sample in each round."""
    for stored, crop in SIZES:
        batch = torch.randint(0, 256, (images, 3, stored, stored), dtype=torch.uint8)
        for changes, settings in CHANGES.items():
            speeds = measure(contestants(batch, crop, settings), rounds)
            for name, values in speeds.items():
                ratios = [value / other for value, other in zip(values, speeds["v2, per sample"], strict=True)]
                yield (
                    f"| {stored} → {crop} | {changes} | {name} | {statistics.median(values):,.0f} | "
                    f"{min(values):,.0f} to {max(values):,.0f} | {statistics.median(ratios):.2f} × | "
                    f"{min(ratios):.2f} to {max(ratios):.2f} |"
                )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128, help="images per batch (128)")
    parser.add_argument("--rounds", type=int, default=9, help="batches of each contestant (9)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| pixels | changes | transform | images/s | range | speed of v2, per sample | range |")
    print("| --- | --- | --- | ---: | --- | ---: | --- |", flush=True)
    for row in rows(arguments.images, arguments.rounds):
        print(row, flush=True)


if __name__ == "__main__":
    main()
