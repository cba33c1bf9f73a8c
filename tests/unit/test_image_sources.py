"""Images of users: arrays and directories, grey and in color, of any size, through sources, task and prediction."""

import base64
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from forked import run_python
from PIL import Image
from torch import nn

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.data.image_dataset import ImageDataset
from distlenet.data.resizing import resize_images, to_tensor
from distlenet.data.sources import load_data, open_data
from distlenet.data.sources.labels import check_labels
from distlenet.data.sources.shard_index import INDEX_NAME
from distlenet.images.decoding import resize_image
from distlenet.images.image_format import ImageFormat
from distlenet.task import SampleKeys
from distlenet.tasks.error_analysis import encode_png
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.image_statistics import measure_images
from distlenet.tasks.image_transform import ImageTransform
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def labels_of(count: int) -> np.ndarray:
    return np.arange(count) % 3


def save_array(path, train, test, **more):
    arrays = {"train_images": train, "train_labels": labels_of(len(train))}
    arrays |= {"test_images": test, "test_labels": labels_of(len(test)), **more}
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return path


def save_folder(root, train, test):
    """Write PNG files that are created in the reverse of their order."""
    for split, images in (("train", train), ("test", test)):
        for number in reversed(range(len(images))):
            path = root / split / f"c{labels_of(len(images))[number]}" / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = images[number]
            Image.fromarray((image.permute(1, 2, 0) if image.dim() == 3 else image).contiguous().numpy()).save(path)
    return root


def save_shards(root, sets, per_shard=40):
    """Write WebDataset shards: KEY.png and KEY.cls."""
    root.mkdir(parents=True)
    for split, (images, labels) in sets.items():
        for start in range(0, len(images), per_shard):
            with tarfile.open(root / f"{split}-{start:04d}.tar", "w") as archive:
                for number in range(start, min(start + per_shard, len(images))):
                    file = io.BytesIO()
                    Image.fromarray(images[number].numpy()).save(file, "PNG")
                    for suffix, content in (("png", file.getvalue()), ("cls", str(int(labels[number])).encode())):
                        member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
    return root


def config_of(name, root, *more):
    return load_config([], [f"data.name={name}", f"data.root={root}", *more])


def load(name, root, *more):
    return load_data(config_of(name, root, *more).data)


@pytest.mark.parametrize("shape", [(28, 28), (3, 20, 30)], ids=["grey", "color"])
def test_array_and_folder_return_the_same_images_in_the_same_order(tmp_path, shape):
    train, test = random_images(25, *shape), random_images(7, *shape)
    array = load("array", save_array(tmp_path / "set.npz", train, test))
    folder = load("folder", save_folder(tmp_path / "set", train, test))
    for data in (array, folder):
        assert isinstance(data.train, ImageDataset)
        assert torch.equal(data.train.images, train)
        assert torch.equal(data.test.images, test)
        assert data.train.labels.tolist() == labels_of(25).tolist()
    assert (array.classes, folder.classes) == (("0", "1", "2"), ("c0", "c1", "c2"))


def test_npy_files_are_read_from_a_directory(tmp_path):
    train = random_images(5, 8, 8).float() / 255
    for name, array in (("train_images", train), ("train_labels", labels_of(5)), ("test_images", train)):
        np.save(tmp_path / f"{name}.npy", np.asarray(array))
    with pytest.raises(UserError, match=r"has no test_labels; expected train_images"):
        load("array", tmp_path)
    np.save(tmp_path / "test_labels.npy", labels_of(5))
    assert torch.equal(load("array", tmp_path).train.images, train)


def with_one_value(count, index, value):
    images = np.zeros((count, 8, 8), np.float32)
    images[index, 2, 2] = value
    return images


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_labels": np.zeros(4)}, "is float64 of shape .4.; expected one integer for each of the 5 images"),
        ({"test_labels": np.array([0, 1, 3])}, "labels from 0 to 3; expected integers from 0 to 1, the labels"),
        ({"train_images": np.zeros((5, 8, 8, 3), np.uint8)}, "channels last; store it as numpy.transpose"),
        ({"train_images": np.zeros((5, 8, 8), np.int64)}, "type int64; expected uint8 or floating point"),
        (
            {"test_images": np.zeros((3, 9, 8), np.uint8)},
            r"test images of shape \[9, 8\].*of \[8, 8\]; give data.size=",
        ),
        ({"val_images": np.zeros((3, 8, 8), np.uint8)}, "has no val_labels"),
        (
            {"train_images": with_one_value(5, 3, np.nan)},
            "train_images: image 3 has values that are not finite; correct or remove it",
        ),
        ({"test_images": with_one_value(3, 1, -np.inf)}, "test_images: image 1 has values that are not finite"),
    ],
)
def test_invalid_arrays_are_refused(tmp_path, more, message):
    arrays = {"train_labels": np.array([0, 1, 0, 1, 0]), "test_labels": np.array([0, 1, 0]), **more}
    path = save_array(tmp_path / "set.npz", *[np.zeros((n, 8, 8), np.uint8) for n in (5, 3)])
    np.savez(path, **{**np.load(path), **arrays})
    with pytest.raises(UserError, match=message):
        load("array", path)


def test_images_of_two_sizes_are_refused_unless_they_are_resized(tmp_path):
    root = save_folder(tmp_path, random_images(4, 3, 20, 30), random_images(4, 3, 20, 30))
    Image.new("RGB", (64, 48)).save(root / "train/c1/0007.png")
    with pytest.raises(UserError, match=r"0007.png: has 48×64 pixels, but the first training image has 20×30; give"):
        load("folder", root)
    data = load("folder", root, "data.size=[16,24]")
    assert data.train.images.shape == (5, 3, 16, 24)
    assert load("folder", root, "data.size=16").test.images.shape == (4, 3, 16, 16)


def test_a_damaged_image_is_named(tmp_path):
    root = save_folder(tmp_path, random_images(4, 20, 30), random_images(4, 20, 30))
    path = root / "train/c1/0001.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"data {path}: is not a readable image: .*; replace or remove the file"):
        load("folder", root)


def test_files_of_a_folder_that_cannot_be_read_and_names_that_are_no_text(tmp_path):
    root = save_folder(tmp_path, random_images(4, 20, 30), random_images(4, 20, 30))
    (root / "train/c1" / os.fsdecode(b"caf\xe9.png")).write_bytes((root / "train/c1/0001.png").read_bytes())
    assert len(load("folder", root).train) == 5
    (root / "train/c1/0009.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"0009.png: cannot be read: No such file or directory; replace or remove it"):
        load("folder", root)


def test_a_directory_without_the_layout_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no directory train and test; expected image files in ROOT/train/CLASS"):
        load("folder", tmp_path)
    with pytest.raises(UserError, match=r"/typo: no such directory; expected image files in ROOT/train/CLASS"):
        load("folder", tmp_path / "typo")
    root = save_folder(tmp_path, random_images(4, 8, 8), random_images(4, 8, 8))
    (root / "test/c9").mkdir()
    (root / "train/c9").mkdir()
    with pytest.raises(UserError, match=r"train/c9: has no images; add some or remove the directory$"):
        load("folder", root)
    (root / "train/c9").rmdir()
    with pytest.raises(UserError, match="class c9 is not in the training set"):
        load("folder", root)
    (root / "test/c9").rename(root / "train/c9")
    Image.new("L", (8, 8)).save(root / "train/c9/0.png")
    with pytest.raises(UserError, match=r"data .*/test: class c9 has no directory; add it, also if it contains no im"):
        load("folder", root)
    (root / "test/c9").mkdir()
    assert load("folder", root).classes == ("c0", "c1", "c2", "c9")


def test_grey_files_among_colored_ones_become_color(tmp_path):
    root = save_folder(tmp_path, random_images(4, 8, 8), random_images(4, 3, 8, 8))
    assert load("folder", root).train.images.shape == (4, 3, 8, 8)


def test_the_fingerprint_depends_on_pixels_labels_and_names(tmp_path):
    images = random_images(6, 8, 8)

    def fingerprint(name, root):
        with open_data(config_of(name, root).data) as opened:
            return dict(opened.fingerprint)

    first = fingerprint("array", save_array(tmp_path / "a.npz", images, images))
    assert fingerprint("array", save_array(tmp_path / "b.npz", images, images)) == first
    changed = images.clone()
    changed[5, 7, 7] ^= 1
    assert fingerprint("array", save_array(tmp_path / "a.npz", changed, images))["train"] != first["train"]
    folder = fingerprint("folder", save_folder(tmp_path / "set", images, images))
    (tmp_path / "set/train/c0/0000.png").rename(tmp_path / "set/train/c0/0009.png")
    assert fingerprint("folder", tmp_path / "set")["train"] != folder["train"]
    assert fingerprint("folder", tmp_path / "set")["test"] == folder["test"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((64, 64), r"these have 64×64; give data.size=32 or another model.name"), ((3, 32, 32), "these have 3 channels")],
)
def test_images_that_lenet_does_not_take_are_refused(tmp_path, shape, message):
    path = save_array(tmp_path / "set.npz", random_images(6, *shape), random_images(6, *shape))
    with pytest.raises(UserError, match=rf"model.name=lenet: takes grey images of at most 32×32 pixels, but {message}"):
        ImageClassification(config_of("array", path)).datasets()
    if len(shape) == 2:
        task = ImageClassification(config_of("array", path, "data.size=32"))
        task.datasets()
        assert task.images.size == (32, 32)


class ViewsImages(nn.Module):
    def forward(self, images):
        return images.expand(-1, 3, -1, -1).to(memory_format=torch.channels_last).view(1, -1)


def test_a_network_that_does_not_fit_is_refused_at_the_first_sample(tmp_path):
    path = save_array(tmp_path / "set.npz", random_images(6, 8, 8), random_images(6, 8, 8))
    for network, message in (
        (
            nn.Linear(7, 3),
            "does not accept images of shape .1, 1, 32, 32.: mat1 and mat2.*give another network, model.args",
        ),
        (
            nn.Conv2d(3, 8, 3),
            "to have 3 channels, but got 1 .*; give another network, or model.args for images with channels: 1$",
        ),
        (ViewsImages(), "view size is not compatible.*; use flatten or reshape, or give model.channels_last=false$"),
        (nn.Flatten(), "returns 1024 values per image, but data.name=array has 3 classes; give a network with 3"),
        (nn.Identity(), "expected one value per image and class"),
    ):
        task = ImageClassification(config_of("array", path))
        images, labels = task.datasets().train.get_batch(torch.tensor([0]))
        with pytest.raises(UserError, match=message):
            task.loss(network, task.transform((images, labels), None))


def test_color_images_are_normalised_per_channel():
    images = random_images(50, 3, 9, 11)
    images[:, 1] //= 2
    found = measure_images(ImageDataset(images, torch.zeros(50, dtype=torch.uint8)))
    values = images.double()
    # Histograms of integers: the only roundings are those of a few float64 operations, 1.1e-16 each.
    assert found.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert found.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), rel=1e-12)
    result = ImageTransform(found, None, "none", 0, None)(images)
    expected = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), correction=0, keepdim=True)
    assert result.shape == (50, 3, 9, 11)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-6)  # a few roundings of float32
    floats = measure_images(ImageDataset(images.float(), torch.zeros(50, dtype=torch.uint8)))
    assert floats.mean == pytest.approx(found.mean, rel=1e-12)
    assert floats.std == pytest.approx(found.std, rel=1e-10)  # a difference of sums of squares loses two digits
    before = images.float()
    ImageTransform(floats, None, "none", 0, None)(before)
    assert torch.equal(before, images.float())  # the stored images are not changed


def test_augmentation_moves_all_channels_of_an_image_together():
    grey, keys = random_images(40, 9, 11), SampleKeys(5, 3, torch.arange(40))
    color = grey.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    statistics = ((0.0,), (1.0,), 0.0, 255.0, False)
    one = ImageTransform(ImageFormat(1, (9, 11), False, *statistics), None, "flip_shift", 3, None)(grey, keys)
    three = ImageTransform(
        ImageFormat(3, (9, 11), False, (0.0,) * 3, (1.0,) * 3, 0.0, 255.0, False), None, "flip_shift", 3, None
    )
    assert torch.equal(three(color, keys), one.expand(-1, 3, -1, -1))
    assert not torch.equal(one[:, 0], grey.float())


def test_an_image_is_resized_the_same_way_alone_and_in_a_batch():
    images = random_images(10, 3, 40, 31)
    batch = resize_images(images, (17, 20))
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.stack([resize_images(image, (17, 20)) for image in images]))
    assert resize_images(images, (40, 31)) is images
    colored = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]  # as decoded from files
    assert torch.equal(batch, torch.stack([to_tensor(resize_image(image, (17, 20))) for image in colored]))
    from torchvision.transforms.v2 import functional

    expected = functional.resize_image(images.float(), [17, 20], antialias=True)
    assert torch.equal(resize_images(images.float(), (17, 20)), expected)
    # Pillow rounds after each of the two directions, by at most half a step each.
    assert (batch - expected).abs().max() <= 1
    permuted = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as decoded: colors next to each other
    assert torch.equal(batch, torch.stack([resize_images(image, (17, 20)) for image in permuted]))


def test_torchvision_is_not_imported_by_training(tmp_path):
    """Its import takes a second. The process is forked from one that has imported the commands."""
    script = tmp_path / "program.py"
    script.write_text("import sys\nprint('distlenet.train' in sys.modules, 'torchvision' in sys.modules)\n")
    assert run_python(script).succeeded().stdout == "True False\n"


@pytest.mark.parametrize("shape", [(8, 9), (3, 8, 9)])
def test_mistakes_are_shown_in_color(shape):
    image = random_images(*shape)
    with Image.open(io.BytesIO(base64.b64decode(encode_png(image)))) as decoded:
        pixels = torch.from_numpy(np.array(decoded))
    assert torch.equal(pixels if len(shape) == 2 else pixels.permute(2, 0, 1), image)
    unit = encode_png(image.float() / 255)  # values from 0 to 1
    assert unit == encode_png(image)


def test_the_format_of_a_first_checkpoint_is_read():
    old = {"mean": 70.0, "std": 80.0, "size": 28, "classes": ["a"]}
    assert ImageFormat.from_dict(old) == ImageFormat(1, (28, 28), False, (70.0,), (80.0,), 0.0, 255.0, True)
    new = ImageFormat(3, (20, 30), True, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), 0.0, 255.0, False)
    assert ImageFormat.from_dict(new.to_dict()) == new


def test_shards_return_the_images_in_their_order(tmp_path):
    images, labels = random_images(90, 9, 11), torch.from_numpy(labels_of(90))
    root = save_shards(tmp_path / "set", {"train": (images, labels), "test": (images[:5], labels[:5])})
    data = load("tar", root)
    assert torch.equal(data.train.images, images)
    assert data.train.labels.tolist() == labels.tolist()
    assert (len(data.test), data.classes, set(data.fingerprint)) == (5, ("0", "1", "2"), {"train", "test"})
    shard = root / "train-0040.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train-0040.tar: "):
        load("tar", root)
    shard.unlink()
    (root / "test-0000.tar").unlink()
    with pytest.raises(UserError, match="has no shards of test; expected ROOT/train"):
        load("tar", root)


def test_the_headers_of_shards_are_read_once(tmp_path, monkeypatch):
    images, labels = random_images(90, 9, 11), torch.from_numpy(labels_of(90))
    root = save_shards(tmp_path / "set", {"train": (images, labels), "test": (images[:5], labels[:5])})
    read, open_tar = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, mode: read.append(path.name) or open_tar(path, mode))

    def loaded():
        read.clear()
        return load("tar", root)

    first = loaded()
    assert read == ["train-0000.tar", "train-0040.tar", "train-0080.tar", "test-0000.tar"]
    again = loaded()
    assert read == []
    assert torch.equal(again.train.images, images)
    assert (again.train.labels.tolist(), again.fingerprint) == (labels.tolist(), first.fingerprint)
    shard = root / "train-0040.tar"
    content = bytearray(shard.read_bytes())
    with open_tar(shard) as archive:
        content[archive.getmember("0040.cls").offset_data] = ord("0")  # it was 1; the size stays the same
    time = shard.stat().st_mtime_ns + 1
    shard.write_bytes(content)
    os.utime(shard, ns=(time, time))
    assert loaded().train.labels.tolist() != labels.tolist()
    assert read == ["train-0040.tar"]
    for damaged in (
        "[]",
        '{"train-0000.tar": {"stamp": 1}',
        (root / INDEX_NAME).read_text().replace('"images"', '"i"'),
        (root / INDEX_NAME).read_text().replace('", 512, ', '", 513, '),  # an offset
        "[" * 100_000,
    ):
        (root / INDEX_NAME).write_text(damaged)
        assert len(loaded().train) == 90
        assert len(read) == 4
    assert not list(root.glob(f"{INDEX_NAME}.*"))  # temporary files
    (root / INDEX_NAME).unlink()
    (root / INDEX_NAME).mkdir()  # cannot be written
    assert len(loaded().train) == 90


def test_shards_with_names_in_another_encoding_and_with_labels_that_are_ids(tmp_path):
    image = io.BytesIO()
    Image.fromarray(random_images(1, 9, 11)[0].numpy()).save(image, "PNG")
    for label in (1, 2**20):
        for split in ("train", "test"):
            with tarfile.open(tmp_path / f"{split}-0.tar", "w", tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
                for suffix, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"caf\xe9.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        if label == 1:
            assert load("tar", tmp_path).train[0][1] == 1
    for _ in range(2):  # from the index the second time
        with pytest.raises(UserError, match=r"has labels up to 1048576; expected integers from 0, below 1,048,576"):
            load("tar", tmp_path)
    with pytest.raises(UserError, match="has labels from 0 to 1048576; expected integers from 0, below 1,048,576"):
        check_labels("set.npz", torch.tensor([0, 2**20]), 2)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_validation_split_is_exact_and_does_not_depend_on_the_seed(fraction):
    whole = load("digits", "data").train
    split = load("digits", "data", f"data.validation={fraction}")
    again = load_data(load_config([], ["data.name=digits", f"data.validation={fraction}", "seed=7"]).data)
    assert len(split.validation) == round(fraction * 1437)
    rows = torch.cat([split.train.rows, split.validation.rows])
    assert rows.sort().values.tolist() == list(range(1437))
    assert torch.equal(split.validation.rows, again.validation.rows)
    images, labels = split.validation.get_batch(torch.tensor([3, 0]))
    assert torch.equal(images, whole.images[split.validation.rows[[3, 0]]])
    assert labels.tolist() == whole.labels[split.validation.rows[[3, 0]]].tolist()
    on_device = split.train.to(torch.device("cpu"))
    assert torch.equal(on_device.images, whole.images[split.train.rows])
    # A hash: each half of the training set has its share, with a standard deviation of at most 13.4 of 718.
    assert abs(int((split.validation.rows < 718).sum()) - fraction * 718) < 5 * 13.4
    assert load("digits", "data").validation is None


def test_a_validation_split_of_a_source_with_a_validation_set_is_refused(tmp_path):
    images = random_images(6, 8, 8)
    more = {"val_images": images[:2], "val_labels": np.array([0, 1])}
    path = save_array(tmp_path / "set.npz", images, images, **more)
    assert len(load("array", path).validation) == 2
    with pytest.raises(UserError, match=r"data.validation=0.5: the data has a validation set"):
        load("array", path, "data.validation=0.5")
    with pytest.raises(UserError, match=r"splits 1437 samples into 1437 and 0"):
        load("digits", "data", "data.validation=0.0001")


@pytest.mark.slow
def test_training_on_the_same_images_of_any_source_has_the_same_bits(tmp_path):
    """Of the reader of Fashion-MNIST, which ``synthetic`` uses too, and of three formats of files."""
    sizes = ("data.synthetic_train=300", "data.synthetic_test=60")
    built_in = load("synthetic", tmp_path, *sizes)
    train, test = built_in.train.get_batch(torch.arange(300)), built_in.test.get_batch(torch.arange(60))
    arrays = {"train_images": train[0], "train_labels": train[1], "test_images": test[0], "test_labels": test[1]}
    np.savez(tmp_path / "set.npz", **{name: array.numpy() for name, array in arrays.items()})
    for split, (images, labels) in (("train", train), ("test", test)):
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            path = tmp_path / "set" / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    states = []
    save_shards(tmp_path / "shards", {"train": train, "test": test})
    for name, root in (("synthetic", "."), ("array", "set.npz"), ("folder", "set"), ("tar", "shards")):
        root = tmp_path / root
        settings = (f"data.name={name}", f"data.root={root}", *sizes, "train.epochs=2", "train.global_batch_size=50")
        run_python("-m", "distlenet.train", *settings, f"run.dir={tmp_path}", f"run.name={name}").succeeded()
        states.append(load_checkpoint(find_checkpoint(tmp_path / name)))
    assert states[0]["step"] == 12
    for other in states[1:]:
        assert all(torch.equal(tensor, other["model"][name]) for name, tensor in states[0]["model"].items())
    assert json.loads((tmp_path / "folder/test.json").read_text())["classes"] == list("0123456789")
    words = ("checkpoint=" + str(tmp_path / "folder"), tmp_path / "set/test/0", "--json")
    assert len(run_python("-m", "distlenet.predict", *words).succeeded().stdout.splitlines()) > 3
