"""Crops, flips, colors and erasing: compared with torchvision, and independent of the batch."""

import hashlib
import math

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional

from distlenet.config.loading import load_config
from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.augmentation import Plan, make_augmentation
from distlenet.tasks.boxes import ATTEMPTS, BOX_DRAWS, random_boxes
from distlenet.tasks.color_jitter import ColorJitter
from distlenet.tasks.cropping import Cropping, resample
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.image_transform import ImageTransform
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
COLORS = ("data.brightness=0.4", "data.contrast=0.4", "data.saturation=0.4", "data.hue=0.1")
EVERYTHING = ("data.augment=shift", "data.crop=[20,24]", "data.flip=0.5", "data.erase=0.5", *COLORS)


def make_images(n: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def image_format(images: torch.Tensor) -> ImageFormat:
    """Grey images have statistics 100 and 50, those of color the same in each channel."""
    channels, size = 1 if images.dim() == 3 else images.shape[1], (images.shape[-2], images.shape[-1])
    high = 255.0 if images.dtype == torch.uint8 else 1.0
    return ImageFormat(channels, size, False, (100.0,) * channels, (50.0,) * channels, 0.0, high, False)


def make_transform(images: torch.Tensor, *settings: str) -> ImageTransform:
    data = load_config([], settings).data
    augmentation = make_augmentation(data)
    if augmentation is not None:
        augmentation.check(image_format(images))
    return ImageTransform(image_format(images), None, data.augment, data.shift, augmentation)


def keys_of(n: int) -> SampleKeys:
    return SampleKeys(7, 2, torch.arange(n))


def reference_box(draws, size, scale, ratio):
    """The loop of torchvision's RandomResizedCrop, with given random numbers; None if ten attempts fail."""
    height, width = size
    for k in range(ATTEMPTS):
        area = height * width * (scale[0] + draws[k] * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + draws[ATTEMPTS + k] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-2] * (height - h + 1)), int(draws[-1] * (width - w + 1)), h, w
    return None


@pytest.mark.parametrize(("size", "whole"), [((48, 64), (48, 64)), ((20, 200), (20, 27))])
def test_random_boxes_are_those_of_torchvision(size, whole):
    draws = keys_of(3000).uniform("boxes", (BOX_DRAWS,))
    boxes = random_boxes(draws, size, SCALE, RATIO, size, whole)
    found = torch.stack([boxes.top, boxes.left, boxes.height, boxes.width], 1).tolist()
    center = ((size[0] - whole[0]) // 2, (size[1] - whole[1]) // 2, *whole)
    expected = [reference_box(row, size, SCALE, RATIO) or center for row in draws.double().tolist()]
    assert found == [list(box) for box in expected]
    assert center in expected  # all attempts failed for some


@pytest.mark.parametrize("size", [(32, 40), (9, 8), (100, 90)])
@pytest.mark.parametrize("convert", [lambda images: images, lambda images: images.float()], ids=["uint8", "float32"])
def test_crops_are_resized_as_by_torchvision(size, convert):
    images = convert(make_images(30, 3, 50, 70))
    draws = keys_of(30).uniform("boxes", (BOX_DRAWS,))
    crop = Cropping(size, SCALE, RATIO)
    boxes = random_boxes(draws, (50, 70), SCALE, RATIO, (50, 70), (50, 67))
    crops = resample(images, crop.taps(draws, images, None))
    for k, image in enumerate(images):
        box = [int(side[k]) for side in (boxes.top, boxes.left, boxes.height, boxes.width)]
        expected = functional.resized_crop(image.float(), *box, size=list(size), antialias=True)
        # torch computes positions in float32: an error of 70 * 2**-24 of a pixel, times a step of 255 between pixels,
        # in two directions and with a few roundings of values up to 255 (2**-17 each).
        torch.testing.assert_close(crops[k], expected, rtol=0, atol=5e-3)
    mirrored = resample(images, crop.taps(draws, images, torch.arange(30) % 2 == 0))
    assert torch.equal(mirrored[::2], crops[::2].flip(-1))
    assert torch.equal(mirrored[1::2], crops[1::2])


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_changed_as_by_torchvision(channels):
    images = make_images(40, channels, 20, 30).float()
    draws = keys_of(40).uniform("colors", (4,))
    changes = {"brightness": 0.5, "contrast": 1.5} | ({"saturation": 0.4, "hue": 0.3} if channels == 3 else {})
    changed = ColorJitter(**changes)(images.clone(), draws)
    for k, image in enumerate(images / 255):
        for name, draw in zip(changes, draws[k].tolist(), strict=False):
            low, high = max(0.0, 1 - changes[name]), 1 + changes[name]
            factor = (2 * draw - 1) * changes[name] if name == "hue" else low + draw * (high - low)
            image = getattr(functional, f"adjust_{name}")(image, factor)
        # The mean for the contrast is rounded to 1/256 of 255 steps, 1.5e-5 at most; factors up to 2.5 and 1.4 follow.
        # Roundings of float32 are 6e-8, times 20 operations; the hue of nearly grey pixels depends on them less.
        torch.testing.assert_close(changed[k] / 255, image, rtol=0, atol=6e-5)


def test_evaluation_takes_the_center():
    images = make_images(5, 3, 40, 60)
    keep = make_transform(images)(images)
    assert torch.equal(make_transform(images, "data.crop=[40,60]", *EVERYTHING[2:])(images), keep)
    assert torch.equal(make_transform(images, "data.crop=20", "data.crop_center=0.5")(images), keep[..., 10:30, 20:40])
    smaller = make_transform(images, "data.crop=[20,10]")(images)
    expected = functional.resized_crop(images.float(), 0, 20, 40, 20, [20, 10], antialias=True)
    torch.testing.assert_close(smaller, (expected - 100) / 50, rtol=0, atol=1e-4)  # 5e-3 / 50, as above


def test_flips_and_erasing_have_their_probabilities():
    n = 4000
    images = make_images(1, 6, 8).expand(n, -1, -1)
    flipped = make_transform(images, "data.flip=0.2")(images, keys_of(n))
    plain = make_transform(images)(images)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], plain[~mirrored])
    assert float(mirrored.double().mean()) == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / n))

    images = make_images(1, 3, 24, 20).clamp_min(101).expand(n, -1, -1, -1)  # no pixel is 0 after the normalisation
    settings = ("data.erase=0.3", "data.erase_scale=[0.1,0.3]", "data.erase_ratio=[0.5,2]")
    erased = (make_transform(images, *settings)(images, keys_of(n)) == 0).all(1)
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None])
    some, shares = rows.any(1), erased.double().mean((1, 2))
    assert float(some.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / n))
    # Uniform in [0.1, 0.3]: standard deviation 0.2 / sqrt(12). Sides of at least 5 pixels are rounded.
    count = int(some.sum())
    assert float(shares[some].mean()) == pytest.approx(0.2, abs=5 * 0.2 / math.sqrt(12 * count) + 0.002)
    ratios = (rows.sum(1) / columns.sum(1))[some].double().log()
    assert float(ratios.mean()) == pytest.approx(0, abs=5 * 2 * math.log(2) / math.sqrt(12 * count) + 0.02)
    assert float(ratios.max()) > math.log(1.8)


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (make_images(21, 3, 30, 34), EVERYTHING),
        (make_images(21, 3, 30, 34), ("data.crop=64", "data.augment=flip_shift", *COLORS)),
        (make_images(21, 30, 34), ("data.flip=0.5", "data.contrast=0.4", "data.erase=1")),
        (make_images(21, 2, 30, 34) / 255, ("data.crop=7", "data.flip=0.5", "data.erase=1")),
    ],
    ids=["everything", "larger", "grey", "float"],
)
def test_a_sample_does_not_depend_on_its_batch(images, settings, monkeypatch):
    indices = torch.arange(len(images))
    transform = make_transform(images, *settings)
    whole = transform(images, SampleKeys(1, 2, indices))
    assert len({sample.numpy().tobytes() for sample in transform(images[:1].expand_as(images), keys_of(21))}) > 15
    order = torch.randperm(21, generator=torch.Generator().manual_seed(3))
    for together in (10**9, 1):  # bytes: the whole batch, and one image after the other
        monkeypatch.setattr("distlenet.tasks.parts.CACHED_BYTES", together)
        parts = [transform(images[part], SampleKeys(1, 2, indices[part])) for part in order.tensor_split([1, 8])]
        assert torch.equal(torch.cat(parts), whole[order])


def test_bits_are_the_same_in_each_version_and_on_each_machine():
    """All operations are exact or have one rounding. A change of these bits would change resumed runs."""
    images = make_images(40, 3, 30, 34)
    result = make_transform(images, *EVERYTHING)(images, keys_of(40))
    assert hashlib.sha256(result.numpy().tobytes()).hexdigest()[:16] == "b717920536f6ac9b"


def test_stored_images_do_not_change():
    for images in (make_images(6, 3, 24, 24), make_images(6, 3, 24, 24) / 1.0):
        before = images.clone()
        make_transform(images, "data.erase=1")(images, keys_of(6))
        make_transform(images, "data.flip=0.5")(images, None)
        assert torch.equal(images, before)
    make_augmentation(load_config([], ["data.brightness=1"]).data).change(images, Plan(colors=torch.zeros(6, 4)))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("channels", "setting", "message"),
    [
        (1, "data.saturation=0.4", "data.saturation=0.4: not for images that are grey; remove it"),
        (1, "data.hue=0.1", "data.hue=0.1: not for images that are grey"),
        (2, "data.contrast=1", "data.contrast=1: not for images that are of 2 channels"),
        (0, "data.brightness=0.1", "data.brightness=0.1: needs uint8 images, but these have values from 0 to 1"),
    ],
)
def test_colors_that_images_do_not_have_are_refused(channels, setting, message):
    images = make_images(1, channels, 8, 8) if channels else torch.rand(1, 8, 8)
    with pytest.raises(UserError, match=message):
        make_transform(images, setting)


def test_a_second_flip_is_refused():
    with pytest.raises(UserError, match=r"data.flip=0.5: data.augment=flip_shift mirrors half of the images already"):
        load_config([], ["data.flip=0.5", "data.augment=flip_shift"])


def test_task_crops_for_training_evaluation_and_prediction():
    settings = ["device=cpu", "data.name=digits", "data.crop=24", "data.mixup=0.2"]
    task = ImageClassification(load_config([], settings))
    own = task.datasets().train.get_batch(torch.arange(6))
    for word, random in (("data.flip=0.5", True), ("data.erase_scale=[0.1,0.2]", False)):
        assert ImageClassification(load_config([], [word])).random_transform == random
    inputs, _ = task.transform((own, own), keys_of(6))
    assert inputs.shape == (6, 1, 32, 32)  # padded for LeNet
    restored = ImageClassification(load_config([], settings))
    restored.load_state_dict(task.state_dict())
    assert torch.equal(restored.predict(nn.Identity(), own[0]), task.transform(own, None)[0])
    for size, message in ((33, r"these have 33×33; give data.crop=32"), ("[20,40]", r"these have 20×40")):
        with pytest.raises(UserError, match=message):
            ImageClassification(load_config([], [*settings, f"data.crop={size}"])).datasets()
