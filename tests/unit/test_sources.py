import hashlib
from importlib.resources import files

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.data import synthetic
from distlenet.data.loader import Loader, place_dataset
from distlenet.data.sources import ImageDataset, load_data
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def load(*overrides: str):
    return load_data(load_config([], overrides).data)


def test_digits_are_the_published_ones_in_a_fixed_split():
    packed = files("distlenet.data").joinpath("digits.csv.gz").read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    assert digest in files("distlenet.data").joinpath("DIGITS.md").read_text()
    data = load("data.name=digits")
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.train.images.shape == (1437, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.test.labels[:3].tolist() == [0, 5, 0]  # rows 0, 5 and 10 of 0 1 2 ... 9 0 1 ...
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180
    ]  # fmt: skip  # the numbers of each digit that the UCI repository gives
    assert int(data.train.images.max()) == 255


def test_digits_are_scaled_bilinearly():
    """The scan's first row is 0 0 5 13 9 1 0 0 of 16; by hand, around the centre of its fourth pixel."""
    image = load("data.name=digits").test.images[0]
    left, right = 0.875 * 13 + 0.125 * 5, 0.875 * 13 + 0.125 * 9
    assert image[0, 13:15].tolist() == [round(left / 16 * 255), round(right / 16 * 255)] == [191, 199]
    assert image[0, :4].tolist() == [0, 0, 0, 0]


def test_a_large_synthetic_set_is_written_once_and_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_IMAGES_IN_MEMORY", 100)
    sizes = ("data.name=synthetic", "data.synthetic_train=101", "data.synthetic_test=7", f"data.root={tmp_path}")
    first = load(*sizes)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "synthetic-101-7").iterdir()}
    assert len(made) == 4
    assert torch.equal(load(*sizes).train.images, first.train.images)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    monkeypatch.setattr(synthetic, "MAX_IMAGES_IN_MEMORY", 1000)
    assert torch.equal(load(*sizes).train.images, first.train.images)
    assert len(first.train.images.unique()) == 256


def test_a_synthetic_set_without_room_is_refused_before_it_is_written(tmp_path):
    huge = ("data.name=synthetic", "data.synthetic_train=2000000000", f"data.root={tmp_path}")
    with pytest.raises(UserError, match=r"data\.synthetic_train=2000000000: .* images take .* bytes, but"):
        load(*huge)
    assert not list(tmp_path.glob("*synthetic-*"))


def test_synthetic_has_any_size_and_the_same_bytes_each_time():
    sizes = ("data.name=synthetic", "data.synthetic_train=101", "data.synthetic_test=7")
    first, second = load(*sizes), load(*sizes)
    assert (len(first.train), len(first.test)) == (101, 7)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_fetches_whole_batches(workers):
    split = ImageDataset(torch.arange(20, dtype=torch.uint8).view(20, 1, 1), torch.arange(20))
    batches = [torch.tensor([3, 1]), torch.tensor([7]), torch.empty(0, dtype=torch.int64)]
    loader = Loader(split, batches, workers, torch.device("cpu"))
    for _ in range(2):
        got = list(loader)
        assert [labels.tolist() for _, labels, _ in got] == [[3, 1], [7], []]
        assert [tuple(images.shape) for images, _, _ in got] == [(2, 1, 1), (1, 1, 1), (0, 1, 1)]
        assert all(torch.equal(indices, batch) for (_, _, indices), batch in zip(got, batches, strict=True))


def test_a_loader_leaves_the_global_generator_alone():
    split = ImageDataset(torch.zeros(2, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    before = torch.get_rng_state()
    list(Loader(split, [torch.tensor([0])], 0, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_stay_where_they_are_without_a_gpu():
    data, cpu = load("data.name=digits"), torch.device("cpu")
    assert place_dataset(data, "auto", 0, cpu) is data
    assert place_dataset(data, "cpu", 2, cpu) is data
    with pytest.raises(UserError, match=r"data\.device=cuda: this rank has no GPU"):
        place_dataset(data, "cuda", 0, cpu)
    with pytest.raises(UserError, match=r"data\.device=cuda: data\.num_workers=2: they have no GPU"):
        place_dataset(data, "cuda", 2, torch.device("cuda", 0))
