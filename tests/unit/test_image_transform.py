import pytest
import torch

from distlenet.data.image_dataset import ImageDataset
from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.image_statistics import measure_images
from distlenet.tasks.image_transform import ImageTransform
from distlenet.utils.keyed_random import hash32

pytestmark = pytest.mark.unit


def measure(images: torch.Tensor) -> ImageFormat:
    return measure_images(ImageDataset(images, torch.zeros(len(images), dtype=torch.uint8)))


def padded(images: torch.Tensor, augment: str = "none", max_shift: int = 2) -> ImageTransform:
    """Return the transform of a set that is padded to 32 pixels."""
    return ImageTransform(measure(images), (32, 32), augment, max_shift, None)


def make_images(n: int, size: int = 28) -> torch.Tensor:
    return torch.randint(1, 256, (n, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_images_are_padded_with_black_and_normalised_by_the_training_set():
    train = make_images(50)
    transform = padded(train)
    mean, std = train.double().mean().item(), train.double().std(correction=0).item()
    assert transform.images.mean[0] == pytest.approx(mean, rel=1e-12)  # float64 sums of 39,200 pixels: about 1e-13
    assert transform.images.std[0] == pytest.approx(std, rel=1e-12)
    inputs = transform(train[:3])
    assert inputs.shape == (3, 1, 32, 32)
    assert inputs.dtype == torch.float32
    expected = torch.full((3, 1, 32, 32), -mean / std)
    expected[:, 0, 2:30, 2:30] = ((train[:3].double() - mean) / std).float()
    torch.testing.assert_close(inputs, expected, rtol=1e-6, atol=1e-6)  # a few roundings of float32, 6e-8 each


def test_images_of_32_pixels_are_not_padded():
    train = make_images(4, 32)
    (mean,), (std,) = measure(train).mean, measure(train).std
    expected = ((train.double() - mean) / std).float().unsqueeze(1)
    torch.testing.assert_close(padded(train)(train), expected, rtol=1e-6, atol=1e-6)  # as above


def augment_one_by_one(transform, images, keys):
    """The slow reference: each image separately, shifted by slicing."""
    augmented = []
    for image, index in zip(images, keys.indices, strict=True):
        bits = int(hash32(index.view(1), keys.seed, keys.epoch))
        padded = torch.zeros(32, 32, dtype=torch.uint8)
        padded[2:30, 2:30] = image
        if transform.augment == "flip_shift" and bits & 1:
            padded = padded.flip(1)
        limit = transform.max_shift
        down, right = (limit - (bits >> first_bit) % (2 * limit + 1) for first_bit in (8, 20))
        shifted = torch.zeros_like(padded)
        shifted[max(down, 0) : 32 + min(down, 0), max(right, 0) : 32 + min(right, 0)] = padded[
            max(-down, 0) : 32 + min(-down, 0), max(-right, 0) : 32 + min(-right, 0)
        ]
        augmented.append((shifted.float() - transform.images.mean[0]) / transform.images.std[0])
    return torch.stack(augmented).unsqueeze(1)


@pytest.mark.parametrize("max_shift", [1, 2, 5])
@pytest.mark.parametrize("augment", ["shift", "flip_shift"])
def test_augmentation_equals_the_slow_reference(augment, max_shift):
    images, keys = make_images(40), SampleKeys(seed=5, epoch=3, indices=torch.arange(1000, 1040))
    transform = padded(images, augment, max_shift)
    assert torch.equal(transform(images, keys), augment_one_by_one(transform, images, keys))


def test_augmentation_does_not_depend_on_the_other_samples_of_the_batch():
    images, indices = make_images(30), torch.arange(30)
    transform = padded(images, "flip_shift")
    whole = transform(images, SampleKeys(1, 2, indices))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    parts = [transform(images[part], SampleKeys(1, 2, indices[part])) for part in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_random_bits_differ_by_epoch_seed_and_sample():
    indices = torch.arange(10_000)
    draws = [SampleKeys(seed, epoch, indices).bits() for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(draws):
        assert len(a.unique()) > 9_980  # of 2^32 values 10,000 draws repeat 0.01 times on average
        for b in draws[:i]:
            assert int((a == b).sum()) <= 2


def test_flips_and_shifts_are_equally_likely():
    bits = SampleKeys(0, 0, torch.arange(100_000)).bits()
    # Standard deviation of a share p of n draws: sqrt(p(1-p)/n), at most 0.0016; five of them.
    assert abs(float((bits & 1).float().mean()) - 0.5) < 5 * 0.0016
    for first_bit in (8, 20):
        shares = torch.bincount((bits >> first_bit) % 5, minlength=5) / 100_000
        assert float((shares - 0.2).abs().max()) < 5 * 0.0013


@pytest.mark.parametrize(
    ("augment", "keys"), [("none", SampleKeys(0, 1, torch.arange(5))), ("flip_shift", None)], ids=["none", "evaluation"]
)
def test_nothing_is_augmented_without_keys_or_with_none(augment, keys):
    images = make_images(5)
    assert torch.equal(padded(images, augment)(images, keys), padded(images)(images))


def test_set_of_a_single_colour_does_not_divide_by_zero():
    transform = padded(torch.zeros(3, 28, 28, dtype=torch.uint8))
    assert torch.isfinite(transform(make_images(2))).all()


def test_large_set_is_measured_on_evenly_spaced_parts(monkeypatch):
    """With 4 parts of 2 images, a set of 101 images is measured on the images 0, 1, 33, 34, 66, 67, 99 and 100."""
    monkeypatch.setattr("distlenet.tasks.image_statistics.SAMPLED_PARTS", 4)
    monkeypatch.setattr("distlenet.tasks.image_statistics.PART_SIZE", 2)
    images = make_images(101)
    measured = images[[0, 1, 33, 34, 66, 67, 99, 100]].double()
    expected = measured.mean().item(), measured.std(correction=0).item()
    assert (measure(images).mean[0], measure(images).std[0]) == pytest.approx(expected, rel=1e-12)
