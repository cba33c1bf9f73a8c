"""Mixup and CutMix: shares, boxes, targets, and partners that do not depend on the batch."""

import math

import numpy as np
import pytest
import torch
from loaders import make_loader
from torch import nn

from distlenet.config.loading import load_config
from distlenet.data.image_dataset import ImageDataset
from distlenet.task import SampleKeys
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.mixing import TABLE_STEPS, Mixing, box_sides, smaller_share_table

pytestmark = pytest.mark.unit

N, CLASSES = 2000, 5
KEYS = SampleKeys(3, 1, torch.arange(N))
CPU = torch.device("cpu")


def random_batch(n: int = N):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(n, 3, 8, 10, generator=generator) + side for side in (1, -2)]  # the samples are positive
    labels = [torch.randint(0, CLASSES, (n,), generator=generator) for _ in range(2)]
    return images[0], labels[0], images[1], labels[1]


def mix(mixing: Mixing, batch, keys: SampleKeys):
    """Mix copies of the images, which are changed in place."""
    own, labels, partners, partner_labels = batch
    return mixing(own.clone(), labels, partners.clone(), partner_labels, keys)


@pytest.mark.parametrize(
    ("alpha", "distribution"),
    [
        (0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
    ],
)
def test_quantiles_of_shares_equal_closed_forms(alpha, distribution):
    """Half of the distribution lies below 1/2. The integration of 2^15 points is exact to about 1e-7."""
    quantiles = smaller_share_table(alpha)
    assert (quantiles[0], quantiles[-1]) == (0, 0.5)
    np.testing.assert_allclose(2 * distribution(quantiles), np.arange(TABLE_STEPS + 1) / TABLE_STEPS, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.001, 0.2, 20.0, 99.0])
def test_quantiles_of_extreme_parameters_are_finite_and_ordered(alpha):
    quantiles = smaller_share_table(alpha)
    assert np.all(np.diff(quantiles) >= 0)
    assert np.isfinite(quantiles).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_have_a_beta_distribution(name):
    shares = Mixing(0.5, 0.5, CLASSES)._share(name, KEYS).double()
    # Beta(a, a) has mean 1/2 and variance 1 / (8a + 4), and here the fourth central moment 3/128.
    assert float(shares.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(1 / 8 / N))
    assert float(((shares - 0.5) ** 2).mean()) == pytest.approx(1 / 8, abs=5 * math.sqrt((3 / 128 - 1 / 64) / N))


def test_mixup_mixes_images_and_labels_by_the_same_share():
    batch = random_batch()
    mixed, targets = mix(Mixing(0.5, 0, CLASSES), batch, KEYS)
    own, label, other, other_label = batch
    for k in range(50):
        share = float((mixed[k, 0, 0, 0] - other[k, 0, 0, 0]) / (own[k, 0, 0, 0] - other[k, 0, 0, 0]))
        torch.testing.assert_close(mixed[k], share * own[k] + (1 - share) * other[k], rtol=0, atol=1e-5)
        expected = torch.zeros(CLASSES)
        expected[label[k]] += share
        expected[other_label[k]] += 1 - share
        torch.testing.assert_close(targets[k], expected, rtol=0, atol=1e-6)


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    batch = random_batch()
    mixed, targets = mix(Mixing(0, 1.0, CLASSES), batch, KEYS)
    own, label, other, other_label = batch
    pasted = mixed[:, :1] < 0
    assert torch.equal(mixed, torch.where(pasted, other, own))
    kept = (~pasted).double().mean((1, 2, 3))
    for k in range(50):
        rows, columns = pasted[k, 0].any(1), pasted[k, 0].any(0)
        assert torch.equal(pasted[k, 0], rows[:, None] & columns)
        assert int(rows.diff().sum()) <= 2  # a box
        assert float(targets[k, label[k]]) == pytest.approx(float(kept[k] if label[k] != other_label[k] else 1))
    assert 0 < float(kept.min()) < 0.3  # boxes are clipped
    assert float(kept.max()) == 1


def test_boxes_have_the_wanted_side_and_are_clipped():
    heights, widths = (side.sum(1) for side in box_sides(8, 10, torch.full((N,), 0.5), KEYS))
    assert (int(heights.max()), int(widths.max())) == (4, 5)
    assert (int(heights.min()), int(widths.min())) == (2, 3)  # centers at the border
    assert not any(side.any() for side in box_sides(8, 10, torch.zeros(N), KEYS))


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_targets_sum_to_one_and_depend_only_on_the_key(alphas):
    batch, mixing = random_batch(), Mixing(*alphas, CLASSES)
    images, targets = mix(mixing, batch, KEYS)
    assert (images.dtype, targets.dtype, targets.shape) == (torch.float32, torch.float32, (N, CLASSES))
    assert float(targets.min()) >= 0
    torch.testing.assert_close(targets.sum(1), torch.ones(N), rtol=0, atol=2**-23)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    parts = [mix(mixing, [x[part] for x in batch], SampleKeys(3, 1, part)) for part in order.split(300)]
    assert torch.equal(torch.cat([part[0] for part in parts]), images[order])
    assert torch.equal(torch.cat([part[1] for part in parts]), targets[order])


def test_with_both_methods_each_is_applied_to_half():
    mixed, _ = Mixing(0.5, 1.0, CLASSES)(*random_batch(), KEYS)
    own, other = random_batch()[0], random_batch()[2]
    cut = torch.where(mixed < 0, other == mixed, own == mixed).all(3).all(2).all(1)
    assert float(cut.double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(N))


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (2, 0), (4, 0)])
def test_partners_do_not_depend_on_ranks_or_workers(world_size, num_workers):
    dataset = ImageDataset(torch.arange(100).view(100, 1, 1), torch.arange(100))

    class Files:
        __len__, __getitem__ = dataset.__len__, dataset.__getitem__

    def pairs(data, ranks, workers):
        options = {"world_size": ranks, "seed": 5, "num_workers": workers, "partners": True}
        loaders = [make_loader(data, 16, rank=rank, **options) for rank in range(ranks)]
        batches = [batch for loader in loaders for epoch in (0, 1) for batch in loader.epoch(epoch)]
        assert all(torch.equal(batch.data[0][1], batch.indices) for batch in batches)
        own = [(batch.epoch, index) for batch in batches for index in batch.indices.tolist()]
        return dict(zip(own, torch.cat([batch.data[1][1] for batch in batches]).tolist(), strict=True))

    expected = pairs(dataset, 1, 0)
    assert len(set(expected.values())) > 75  # 1 - e^-2 of 100 are drawn
    assert pairs(Files(), world_size, num_workers) == expected


def test_task_mixes_in_training_only():
    settings = ["device=cpu", "data.name=digits", "data.augment=flip_shift", "train.label_smoothing=0.1"]
    task = ImageClassification(load_config([], [*settings, "data.mixup=0.4", "data.cutmix=1"]))
    plain = ImageClassification(load_config([], settings))
    assert (task.partners, plain.partners) == (True, False)
    indices = torch.arange(12)
    train = task.datasets().train
    own, partners = train.get_batch(indices), train.get_batch(indices + 50)
    keys = SampleKeys(0, 0, indices)
    inputs, targets = task.transform((own, partners), keys)
    assert targets.shape == (12, 10)
    plain.datasets()
    assert torch.equal(task.transform(own, None)[0], plain.transform(own, None)[0])
    assert torch.equal(task.transform(own, None)[1], own[1])

    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 10))
    losses, logits = task.loss(model, (inputs, targets))
    by_class = torch.stack([plain.loss(model, (inputs, torch.full((12,), k)))[0] for k in range(10)], 1)
    # Cross-entropy is linear in the targets; ten products of float32, up to about 5.
    torch.testing.assert_close(losses, (by_class * targets).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(task.metrics(logits, (inputs, targets))["accuracy"], logits.argmax(1) == targets.argmax(1))
