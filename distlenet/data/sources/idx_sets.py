"""The built-in data sets, which are or become IDX files: Fashion-MNIST, MNIST, digits and synthetic images."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack, closing
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from distlenet.config.schema import DataConfig
from distlenet.data import download, idx
from distlenet.data.sources.opened import OpenedImages, StoredImages
from distlenet.data.synthetic import open_synthetic
from distlenet.utils.mapped_file import SharedFile, TensorRef, create_shared

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def open_published(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:
    """Open Fashion-MNIST or MNIST: locate or download its files, and verify them."""
    sums = idx.SHA256[config.name]
    paths = download.locate_or_download(config.name, Path(config.root), fetch)
    opened = {name: idx.open_verified(path, sums[name]) for name, path in paths.items()}
    classes = CLOTHES if config.name == "fashion_mnist" else DIGITS
    directory = str(next(iter(paths.values())).parent)
    return _opened(directory, classes, opened, stack, {name: f"SHA-256 {sums[name][:16]}" for name in idx.FILES})


def open_digits(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """Open the bundled digits (see DIGITS.md), 1,437 for training and 360 for test, scaled from 8×8 to 32×32."""
    path = files("distlenet.data").joinpath("digits.csv.gz")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = torch.from_numpy(np.loadtxt(Path(str(path)), dtype=np.uint8, delimiter=","))
    small = rows[:, :64].view(-1, 1, 8, 8).float() * (255 / 16)  # values from 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8).squeeze(1)
    is_test = torch.arange(len(rows)) % 5 == 0
    parts = (images[~is_test], rows[~is_test, 64], images[is_test], rows[is_test, 64])
    opened = {
        name: create_shared((idx.header(tuple(part.shape)), part.numpy().tobytes()))
        for name, part in zip(idx.FILES, parts, strict=True)
    }
    return _opened("bundled", DIGITS, opened, stack, {"digits": f"SHA-256 {digest[:16]}"})


def open_generated(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """Open random images."""
    sizes = {"train": config.synthetic_train, "test": config.synthetic_test}
    opened = open_synthetic(Path(config.root), *sizes.values())
    return _opened("generated", DIGITS, opened, stack, {name: f"{size} random images" for name, size in sizes.items()})


def _opened(
    source: str,
    classes: tuple[str, ...],
    opened: Mapping[str, SharedFile],
    stack: ExitStack,
    fingerprint: Mapping[str, str],
) -> OpenedImages:
    """Describe the four files, and let ``stack`` close them."""
    for file in opened.values():
        stack.enter_context(closing(file))
    train_images, train_labels, test_images, test_labels = (_tensor(opened[name]) for name in idx.FILES)
    train, test = StoredImages(train_images, train_labels), StoredImages(test_images, test_labels)
    return OpenedImages(source, classes, train, test, fingerprint=fingerprint)


def _tensor(file: SharedFile) -> TensorRef:
    data = idx.parse(file.ref.map())
    return TensorRef(file.ref, int(data.storage_offset()), tuple(data.shape), data.dtype)
