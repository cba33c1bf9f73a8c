import pytest
import torch

from distlenet.data.transforms import Prepare, hash32, measure

pytestmark = pytest.mark.unit


def images(n: int, size: int = 28) -> torch.Tensor:
    return torch.randint(1, 256, (n, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_images_are_padded_with_black_and_normalised_by_the_training_set():
    train = images(50)
    prepare = Prepare(*measure(train), "none", 0)
    mean, std = train.double().mean().item(), train.double().std(correction=0).item()
    assert prepare.mean == pytest.approx(mean, rel=1e-12)  # float64 sums of 39,200 pixels: about 1e-13
    assert prepare.std == pytest.approx(std, rel=1e-12)
    out = prepare(train[:3])
    assert out.shape == (3, 1, 32, 32)
    assert out.dtype == torch.float32
    expected = torch.full((3, 1, 32, 32), -mean / std)
    expected[:, 0, 2:30, 2:30] = ((train[:3].double() - mean) / std).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # a few roundings of float32, 6e-8 each


def test_images_of_32_pixels_are_not_padded():
    train = images(4, 32)
    assert torch.equal(Prepare(*measure(train), "none", 0)(train) * 0 + 1, torch.ones(4, 1, 32, 32))


def one_by_one(prepare, batch, indices, epoch):
    """The slow reference: each image alone, shifted by slicing."""
    out = []
    for image, index in zip(batch, indices, strict=True):
        random = int(hash32(index.view(1), prepare.seed, epoch))
        padded = torch.zeros(32, 32, dtype=torch.uint8)
        padded[2:30, 2:30] = image
        if prepare.augment == "flip_shift" and random & 1:
            padded = padded.flip(1)
        down, right = (prepare.shift - (random >> bits) % (2 * prepare.shift + 1) for bits in (8, 20))
        moved = torch.zeros_like(padded)
        moved[max(down, 0) : 32 + min(down, 0), max(right, 0) : 32 + min(right, 0)] = padded[
            max(-down, 0) : 32 + min(-down, 0), max(-right, 0) : 32 + min(-right, 0)
        ]
        out.append((moved.float() - prepare.mean) / prepare.std)
    return torch.stack(out).unsqueeze(1)


@pytest.mark.parametrize("shift", [1, 2, 5])
@pytest.mark.parametrize("augment", ["shift", "flip_shift"])
def test_augmentation_is_the_slow_reference(augment, shift):
    batch, indices = images(40), torch.arange(1000, 1040)
    prepare = Prepare(*measure(batch), augment, seed=5, shift=shift)
    assert torch.equal(prepare.augmented(batch, indices, epoch=3), one_by_one(prepare, batch, indices, 3))


def test_augmentation_does_not_depend_on_the_neighbours_in_the_batch():
    batch, indices = images(30), torch.arange(30)
    prepare = Prepare(*measure(batch), "flip_shift", seed=1)
    whole = prepare.augmented(batch, indices, 2)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    parts = [prepare.augmented(batch[part], indices[part], 2) for part in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_augmentation_differs_by_epoch_seed_and_sample():
    indices = torch.arange(10_000)
    draws = [hash32(indices, seed, epoch) for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(draws):
        assert len(a.unique()) > 9_980  # of 2^32 values 10,000 draws repeat 0.01 times on average
        for b in draws[:i]:
            assert int((a == b).sum()) <= 2


def test_flips_and_shifts_are_equally_likely():
    random = hash32(torch.arange(100_000), 0, 0)
    # Standard deviation of a share p of n draws: sqrt(p(1-p)/n), at most 0.0016; five of them.
    assert abs(float((random & 1).float().mean()) - 0.5) < 5 * 0.0016
    for bits in (8, 20):
        shares = torch.bincount((random >> bits) % 5, minlength=5) / 100_000
        assert float((shares - 0.2).abs().max()) < 5 * 0.0013


def test_none_augments_nothing():
    batch = images(5)
    prepare = Prepare(*measure(batch), "none", 0)
    assert torch.equal(prepare.augmented(batch, torch.arange(5), 1), prepare(batch))


def test_a_set_of_one_colour_does_not_divide_by_zero():
    assert torch.isfinite(Prepare(*measure(torch.zeros(3, 28, 28, dtype=torch.uint8)), "none", 0)(images(2))).all()
