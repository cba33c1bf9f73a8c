"""Datasets of a user's function, and CIFAR-10, with files that a test writes."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.data.sources.custom import load_custom
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.task import Datasets
from distlenet.tasks.image_statistics import measure_images
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

CONFIG = load_config([], ["data.name=digits"]).data
ONE_RANK = DistributedEnvironment()


def image(size=(8, 6), mode="RGB"):
    return Image.new(mode, size, 7)


def make(*samples, classes=("a", "b")):
    return lambda: Datasets(list(samples), [samples[0]], classes=classes)


def test_pil_images_and_tensors_become_tensors_of_one_shape():
    data = load_custom(make((image(), 0), (image(), torch.tensor(1))), {}, CONFIG, ONE_RANK)
    assert [(tuple(i.shape), i.dtype, label) for i, label in data.train] == [
        ((3, 6, 8), torch.uint8, 0),
        ((3, 6, 8), torch.uint8, 1),
    ]
    floats = load_custom(
        make((torch.rand(9, 9), 0)), {}, load_config([], ["data.name=digits", "data.size=5"]).data, ONE_RANK
    )
    assert (floats.train[0][0].shape, floats.train[0][0].dtype) == ((5, 5), torch.float32)


def test_the_arguments_are_passed():
    def function(count):
        return Datasets([(image(), 0)] * count, [(image(), 0)])

    split = load_custom(
        function, {"count": 20}, load_config([], ["data.name=digits", "data.validation=0.25"]).data, ONE_RANK
    )
    assert (len(split.train), len(split.validation)) == (15, 5)


def test_the_directory_is_an_argument():
    config = load_config([], ["data.name=builtins:dict", "data.root=/images"])
    with pytest.raises(UserError, match=r"data.root=/images: .* receives data.args only; give data.args.root=/images"):
        load_data(config.data)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((image((9, 6)), 0), r"training set, sample 1: has 6×9 pixels, but the first sample has 6×8; give data.size"),
        ((image(mode="L"), 0), r"of shape \[6, 8\], but the first sample is torch.uint8 of \[3, 6, 8\]"),
        ((image(), 2), r"the label is 2; expected an integer from 0 to 1, one per class"),
        ((image(), "a"), r"the label is a str"),
        (image(), r"is a Image; expected a tuple"),
        (("a.png", 0), r"the image is a str; expected a PIL image, or a tensor"),
    ],
)
def test_a_wrong_sample_is_named(sample, message):
    data = load_custom(make((image(), 0), sample), {}, CONFIG, ONE_RANK)
    with pytest.raises(UserError, match=message):
        data.train[1]


def test_another_result_than_datasets_is_refused():
    with pytest.raises(UserError, match=r"returned a list; expected distlenet\.Datasets"):
        load_custom(list, {}, CONFIG, ONE_RANK)


def test_cifar10_is_read_by_torchvision(monkeypatch, tmp_path):
    config = load_config([], ["data.name=cifar10", f"data.root={tmp_path}"]).data
    with pytest.raises(UserError, match=r"is not in .*cifar-10-batches-py; give the data.root .* distlenet.data"):
        load_data(config)
    directory = tmp_path / "cifar-10-batches-py"
    directory.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    files = {
        "data_batch_1": {"data": pixels, "labels": [0, 1, 9, 3]},
        "test_batch": {"data": pixels, "labels": [1] * 4},
    }
    files["batches.meta"] = {"label_names": [f"class {i}" for i in range(10)]}
    sums = {}
    for name, content in files.items():
        (directory / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((directory / name).read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"cannot be read or downloaded: Dataset not found or corrupted"):
        load_data(config)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    data = load_data(config)
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert data.train.labels.tolist() == [0, 1, 9, 3]
    assert data.classes[9] == "class 9"


class Noise:
    """A dataset with a random transform."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.rand(4, 4) + index, 0


def test_statistics_of_random_transforms_are_the_same_in_every_start():
    data = load_custom(lambda: Datasets(Noise(), Noise()), {}, CONFIG, ONE_RANK)
    first = measure_images(data.train)
    torch.manual_seed(3)
    assert measure_images(data.train) == first
    assert 2 < first.mean[0] < 3
