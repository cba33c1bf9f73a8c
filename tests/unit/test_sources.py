import hashlib
from importlib.resources import files

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.data import synthetic
from distlenet.data.sources import ImageDataset, load_data, open_data
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def load(*overrides: str):
    return load_data(load_config([], overrides).data)


def test_digits_are_the_published_ones_in_a_fixed_split():
    compressed = files("distlenet.data").joinpath("digits.csv.gz").read_bytes()
    digest = hashlib.sha256(compressed).hexdigest()
    assert digest in files("distlenet.data").joinpath("DIGITS.md").read_text()
    data = load("data.name=digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape == (1437, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.test.labels[:3].tolist() == [0, 5, 0]  # rows 0, 5 and 10 of 0 1 2 ... 9 0 1 ...
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip  # the number of each digit as given by the UCI repository
    assert int(data.train.images.max()) == 255


def test_digits_are_scaled_bilinearly():
    """The scan's first row is 0 0 5 13 9 1 0 0 of 16; expected values around the centre of its fourth pixel."""
    image = load("data.name=digits").test.images[0]
    left, right = 0.875 * 13 + 0.125 * 5, 0.875 * 13 + 0.125 * 9
    assert image[0, 13:15].tolist() == [round(left / 16 * 255), round(right / 16 * 255)] == [191, 199]
    assert image[0, :4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_there_is_a_class_name_for_each_label(name):
    data = load(f"data.name={name}", "data.synthetic_train=101", "data.synthetic_test=7")
    assert data.classes == tuple("0123456789")
    assert int(data.train.labels.max()) == len(data.classes) - 1


def test_a_large_synthetic_set_is_written_once_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_IMAGES_IN_MEMORY", 100)
    overrides = ("data.name=synthetic", "data.synthetic_train=101", "data.synthetic_test=7", f"data.root={tmp_path}")
    (tmp_path / ".synthetic-of-a-killed-job").mkdir()
    first = load(*overrides)
    assert not list(tmp_path.glob(".synthetic-*"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "synthetic-101-7").iterdir()}
    assert len(times) == 4
    assert torch.equal(load(*overrides).train.images, first.train.images)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    monkeypatch.setattr(synthetic, "MAX_IMAGES_IN_MEMORY", 1000)
    assert torch.equal(load(*overrides).train.images, first.train.images)
    assert len(first.train.images.unique()) == 256


def test_a_synthetic_set_without_disk_space_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(UserError, match=r"data\.synthetic_train=2000000000: .* images take .* bytes, but"):
        load("data.name=synthetic", "data.synthetic_train=2000000000", f"data.root={tmp_path}")
    assert not list(tmp_path.glob("*synthetic-*"))


def test_a_synthetic_set_has_any_size_and_always_the_same_bytes():
    first, second = (load("data.name=synthetic", "data.synthetic_train=101", "data.synthetic_test=7") for _ in range(2))
    assert (len(first.train), len(first.test)) == (101, 7)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


def test_open_data_closes_the_files_at_the_end():
    with open_data(load_config([], ["data.name=digits"]).data) as opened:
        assert opened.source == "bundled"
        refs = [ref for split in (opened.train, opened.test) for ref in (split.images, split.labels)]
        assert all(len(ref.map()) for ref in refs)
    for ref in refs:
        with pytest.raises(FileNotFoundError):
            ref.map()


@pytest.mark.parametrize("indices", [[3, 1, 3], []])
def test_getitems_returns_the_images_and_int64_labels(indices):
    dataset = ImageDataset(
        torch.arange(20, dtype=torch.uint8).view(5, 2, 2), torch.tensor([4, 3, 2, 1, 0], dtype=torch.uint8)
    )
    images, labels = dataset.get_batch(torch.tensor(indices, dtype=torch.int64))
    assert images.shape == (len(indices), 2, 2)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images[:, 0, 0].tolist() == [4 * index for index in indices]
    assert labels.tolist() == [4 - index for index in indices]


def test_nbytes_counts_images_and_labels():
    assert load("data.name=digits").test.nbytes == 360 * (32 * 32 + 1)
