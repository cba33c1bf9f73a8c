"""Open the image data sets by name and map them into memory, once per node."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data import download, idx
from distlenet.data.synthetic import open_synthetic
from distlenet.distributed.collectives import broadcast_from_local_rank_0, raise_on_all_ranks
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.utils.errors import UserError, warn
from distlenet.utils.mapped_file import FileRef, SharedFile, create_shared

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLASSES = {"fashion_mnist": CLOTHES, "mnist": DIGITS, "digits": DIGITS, "synthetic": DIGITS}


@dataclass(frozen=True)
class ImageDataset:
    """Images uint8 (N, H, W) and their labels (N,) of an integer type."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the labels, as int64, of ``indices``: int64 (n,) on the device of the images."""
        return self.images.index_select(0, indices), self.labels.index_select(0, indices).long()

    @property
    def nbytes(self) -> int:
        """Number of bytes of the images and labels."""
        return self.images.nbytes + self.labels.nbytes

    def to(self, device: torch.device) -> "ImageDataset":
        """Return the dataset on ``device``."""
        return ImageDataset(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A training and a test set, the names of their classes, and their source."""

    train: ImageDataset
    test: ImageDataset
    classes: tuple[str, ...]
    source: str


class OpenData(NamedTuple):
    """The open files of a data set, by their names in ``idx.FILES``: all that other ranks need to map them."""

    source: str
    refs: dict[str, FileRef]


@contextmanager
def open_data(config: DataConfig, debian: bool = False) -> Iterator[OpenData]:
    """Locate or download the configured data set, verify it, and keep its files open for the ranks of this node.

    Mappings stay valid after the context ends. Raise UserError if the data is unavailable or damaged.
    """
    root, source = Path(config.root), "generated"
    if config.name == "digits":
        files, source = _digits(), "bundled"
    elif config.name == "synthetic":
        files = open_synthetic(root, config.synthetic_train, config.synthetic_test)
    else:
        paths = download.locate_or_download(config.name, root, debian)
        source = str(next(iter(paths.values())).parent)
        files = {name: idx.open_verified(path, idx.SHA256[config.name][name]) for name, path in paths.items()}
    with ExitStack() as stack:
        for file in files.values():
            stack.enter_context(closing(file))
        yield OpenData(source, {name: file.ref for name, file in files.items()})


def require_local_data(config: DataConfig) -> None:
    """Raise UserError if the configured data set is not on this machine; download nothing."""
    name, root = f"data.name={config.name}", f"data.root={config.root}"
    if config.name in idx.SHA256 and download.locate(config.name, Path(config.root)) is None:
        raise UserError(f"{name}: is not in {root}; run python -m distlenet.data {name} {root}")


def map_data(name: str, opened: OpenData) -> ImageData:
    """Map the files of a data set that a process of this node holds open. Raise OSError if they are not visible."""
    train_images, train_labels, test_images, test_labels = (idx.parse(opened.refs[file].map()) for file in idx.FILES)
    train, test = ImageDataset(train_images, train_labels), ImageDataset(test_images, test_labels)
    return ImageData(train, test, CLASSES[name], opened.source)


def load_data(config: DataConfig, debian: bool = False) -> ImageData:
    """Open, verify and map the configured data set in this process. Raise UserError as ``open_data``."""
    with open_data(config, debian) as opened:
        return map_data(config.name, opened)


def load_images(config: DataConfig) -> ImageData:
    """Load the configured data set, in a job once per node. Raise UserError as ``open_data``. A collective."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return load_data(config)
    return load_on_node(config, read_environment(os.environ))


def load_on_node(config: DataConfig, env: DistributedEnvironment) -> ImageData:
    """Load once per node: its first rank opens and verifies, all its ranks map the same memory. A collective."""
    with ExitStack() as stack:
        opened = None
        with raise_on_all_ranks():
            if env.local_rank == 0:
                opened = stack.enter_context(open_data(config))
        opened = broadcast_from_local_rank_0(opened, env)
        with raise_on_all_ranks():  # a collective: no rank closes the files before all have mapped them
            try:
                return map_data(config.name, opened)
            except OSError as error:
                warn(
                    f"rank {env.rank}: cannot map the images that local rank 0 has opened ({error}) and keeps a copy "
                    "of them; let the ranks of a node share their process namespace"
                )
                return load_data(config)


def _digits() -> dict[str, SharedFile]:
    """Return the bundled digits (see DIGITS.md), 1,437 for training and 360 for test, scaled from 8×8 to 32×32."""
    path = Path(__file__).with_name("digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(path, dtype=np.uint8, delimiter=","))
    small = rows[:, :64].view(-1, 1, 8, 8).float() * (255 / 16)  # values from 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8).squeeze(1)
    is_test = torch.arange(len(rows)) % 5 == 0
    parts = (images[~is_test], rows[~is_test, 64], images[is_test], rows[is_test, 64])
    return {
        name: create_shared((idx.header(tuple(part.shape)), part.numpy().tobytes()))
        for name, part in zip(idx.FILES, parts, strict=True)
    }
