"""The data sets by name, as unsigned bytes, in memory that the ranks of a node share."""

import csv
import gzip
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data import download, idx
from distlenet.data.synthetic import open_synthetic
from distlenet.distributed.collectives import broadcast_from_local_rank_0, raise_on_all_ranks
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError, warn
from distlenet.utils.mapped_file import Place, SharedFile, in_memory

FileRefs = tuple[str, dict[str, Place]]
"""Where a data set came from, and where its four files are to be mapped."""


@dataclass(frozen=True)
class ImageDataset:
    """Images uint8 (N, H, W) and their labels (N,), of any integer type."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
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
    """A training and a test set, the names of their classes, and where they came from."""

    train: ImageDataset
    test: ImageDataset
    classes: tuple[str, ...]
    source: str

    @property
    def nbytes(self) -> int:
        """Number of bytes of both sets."""
        return self.train.nbytes + self.test.nbytes

    def to(self, device: torch.device) -> "ImageData":
        """Return both sets on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


class OpenData:
    """A data set's four files, open on the first rank of a node for all ranks there."""

    def __init__(self, files: dict[str, SharedFile], source: str) -> None:
        """Own ``files``, by their names in ``idx.FILES``."""
        self.files, self.source = files, source

    @property
    def refs(self) -> FileRefs:
        """Where the node's other ranks find them, in plain values."""
        return self.source, {name: file.place for name, file in self.files.items()}

    def close(self) -> None:
        """Let go; what is mapped stays."""
        for file in self.files.values():
            file.close()


def open_data(config: DataConfig, debian: bool = False) -> OpenData:
    """Find the data set that ``config`` names, or get it (see ``distlenet.data.download``), and verify it.

    Raises UserError where it cannot be had, naming the ways to get it, and for a file that is damaged.
    """
    if config.name == "digits":
        return OpenData(_digits(), "bundled")
    root = Path(config.root)
    if config.name == "synthetic":
        return OpenData(open_synthetic(root, config.synthetic_train, config.synthetic_test), "generated")
    paths = download.locate_or_download(config.name, root, debian)
    files = {name: idx.open_verified(path, idx.SHA256[config.name][name]) for name, path in paths.items()}
    return OpenData(files, str(next(iter(paths.values())).parent))


def require_local_data(config: DataConfig) -> None:
    """Raise UserError where the data set that ``config`` names is not on this machine; download nothing."""
    root = Path(config.root)
    if config.name in idx.SHA256 and download.locate(config.name, root) is None:
        raise UserError(
            f"data.name={config.name}: is not in data.root={root} here; "
            f"python -m distlenet.data data.name={config.name} data.root={root} gets it"
        )


def map_data(name: str, refs: FileRefs) -> ImageData:
    """Map the files that the first rank of this node has opened. Raises OSError where they are not to be seen."""
    source, by_name = refs
    parts = {name: idx.parse(place.map()) for name, place in by_name.items()}
    train_images, train_labels, test_images, test_labels = (parts[file] for file in idx.FILES)
    train, test = ImageDataset(train_images, train_labels), ImageDataset(test_images, test_labels)
    return ImageData(train, test, CLASSES["fashion_mnist" if name == "fashion_mnist" else "mnist"], source)


def load_data(config: DataConfig, debian: bool = False) -> ImageData:
    """Open, verify and map the data set that ``config`` names, as a process of its own; errors as ``open_data``."""
    with closing(open_data(config, debian)) as opened:
        return map_data(config.name, opened.refs)


def load_on_node(config: DataConfig, env: DistributedEnvironment) -> ImageData:
    """Load once per node: its first rank opens and verifies, all its ranks map the same memory. A collective."""
    with ExitStack() as stack:
        refs = None
        with raise_on_all_ranks():
            if env.local_rank == 0:
                refs = stack.enter_context(closing(open_data(config))).refs
        refs = broadcast_from_local_rank_0(refs, env)
        with raise_on_all_ranks():
            try:
                data = map_data(config.name, refs)
            except OSError as error:
                warn(
                    f"rank {env.rank}: the images that local rank 0 has opened are not to be seen here ({error}); "
                    "this rank keeps a copy of its own; let ranks of a node share their process namespace"
                )
                data = load_data(config)
        return data  # all have mapped: the files can be closed


def _digits() -> dict[str, SharedFile]:
    """The bundled digits (see DIGITS.md): 1,437 to train on and 360 to test, scaled from 8×8 to 32×32."""
    packed = resources.files("distlenet.data").joinpath("digits.csv.gz").read_bytes()
    rows = torch.tensor([[int(v) for v in row] for row in csv.reader(gzip.decompress(packed).decode().splitlines())])
    small = rows[:, :64].view(-1, 1, 8, 8).float() * (255 / 16)  # ink from 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8).squeeze(1)
    held_out = torch.arange(len(rows)) % 5 == 0
    labels = rows[:, 64].to(torch.uint8)
    parts = (images[~held_out], labels[~held_out], images[held_out], labels[held_out])
    return {
        name: in_memory((idx.header(tuple(part.shape)), part.numpy().tobytes()))
        for name, part in zip(idx.FILES, parts, strict=True)
    }


CLASSES = {
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "mnist": tuple("0123456789"),
}
