"""Datasets of a user's function, and CIFAR-10, with files that a test writes."""

import hashlib
import math
import pickle
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """The pixels of a small CIFAR-10, and the directory with its files, whose archive torchvision downloads."""
    directory = tmp_path / "published" / "cifar-10-batches-py"
    directory.mkdir(parents=True)
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
    archive = Path(shutil.make_archive(str(tmp_path / "published"), "gztar", directory.parent, directory.name))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    yield pixels, directory
    server.shutdown()
    server.server_close()


def cifar10_in(root):
    return load_config([], ["data.name=cifar10", f"data.root={root}"]).data


def test_cifar10_is_read_by_torchvision(cifar10, tmp_path):
    pixels, directory = cifar10
    with pytest.raises(UserError, match=r"is not in .*cifar-10-batches-py; give the data.root .* distlenet.data"):
        load_data(cifar10_in(tmp_path))
    data = load_data(cifar10_in(directory.parent))
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert data.train.labels.tolist() == [0, 1, 9, 3]
    assert data.classes[9] == "class 9"
    (directory / "test_batch").write_bytes(b"")
    message = rf"cannot be read: Dataset not found or corrupted.*; remove {directory} and run again"
    with pytest.raises(UserError, match=message):
        load_data(cifar10_in(directory.parent))


def test_an_interrupted_download_of_cifar10_is_repeated(cifar10, monkeypatch, tmp_path):
    pixels, directory = cifar10
    root = tmp_path / "root"

    def unpack_a_part(archive, target, *_):
        shutil.copytree(directory, Path(target) / directory.name, ignore=shutil.ignore_patterns("test_batch"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", unpack_a_part)
        with pytest.raises(KeyboardInterrupt):
            load_data(cifar10_in(root), fetch=True)
    (root / ".download-cifar10-of-a-killed-job" / directory.name).mkdir(parents=True)
    data = load_data(cifar10_in(root), fetch=True)
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert [path.name for path in root.iterdir() if path.name != ".cifar10.lock"] == [directory.name]


def test_a_process_that_waited_for_the_download_of_cifar10_uses_it(cifar10, monkeypatch, tmp_path):
    _, directory = cifar10
    root = tmp_path / "root"

    @contextmanager
    def lock_of_another_process(*_, **__):
        shutil.copytree(directory, root / directory.name)  # before it releases the lock
        yield

    monkeypatch.setattr("filelock.FileLock", lock_of_another_process)
    monkeypatch.setattr(CIFAR10, "url", "file:///missing")
    assert len(load_data(cifar10_in(root), fetch=True).train) == 4


@pytest.mark.parametrize(("name", "value"), [("url", "file:///missing"), ("tgz_md5", "0" * 32)])
@pytest.mark.usefixtures("cifar10")
def test_a_download_of_cifar10_that_fails(monkeypatch, tmp_path, name, value):
    root = tmp_path / "root"
    monkeypatch.setattr(CIFAR10, name, value)
    with pytest.raises(UserError, match=r"cannot be downloaded: .*; put the published cifar-10-batches-py into "):
        load_data(cifar10_in(root), fetch=True)
    assert not (root / "cifar-10-batches-py").exists()


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


@pytest.mark.parametrize("validation", [0, 0.25])
def test_a_training_image_that_is_not_finite_is_named_where_the_statistics_are_measured(validation):
    images = torch.zeros(8, 4, 4)
    images[6, 1, 1] = math.nan
    config = load_config([], ["data.name=digits", f"data.validation={validation}"]).data
    data = load_custom(make(*((image, 0) for image in images)), {}, config, ONE_RANK)
    with pytest.raises(UserError, match=r"training set, sample 6: has values that are not finite; correct or remove"):
        measure_images(data.train)
