"""The data sets by name, whole and in memory, as unsigned bytes."""

import csv
import gzip
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distlenet.data import download, idx
from distlenet.errors import UserError
from distlenet.schema import DataConfig


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W) and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A data set: its two splits, the names of its classes, and where it came from."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str


def fetch_data(config: DataConfig, debian: bool = False) -> dict[str, Path]:
    """Find the files of the data set that ``config`` names, or download them; see ``distlenet.data.download``.

    Returns their paths by name; none for a set that has no files of its own. Raises UserError where they cannot
    be had, naming the ways to get them.
    """
    if config.name in ("digits", "synthetic"):
        return {}
    return download.locate_or_download(config.name, Path(config.root), debian)


def load_data(config: DataConfig) -> ImageData:
    """Load the data set that ``config`` names. Raises UserError as ``fetch_data``, and for a file that is damaged."""
    if config.name == "digits":
        return _digits()
    if config.name == "synthetic":
        return _synthetic(config.synthetic_train, config.synthetic_test)
    paths = fetch_data(config)
    parts = {name: idx.read_verified(path, idx.SHA256[config.name][name]) for name, path in paths.items()}
    train, test = (
        Split(parts[f"{prefix}-images-idx3-ubyte"], parts[f"{prefix}-labels-idx1-ubyte"].long())
        for prefix in ("train", "t10k")
    )
    return ImageData(train, test, CLASSES[config.name], str(next(iter(paths.values())).parent))


def _digits() -> ImageData:
    """The bundled digits (see DIGITS.md): 1,437 to train on and 360 to test, scaled from 8×8 to 32×32."""
    packed = files("distlenet.data").joinpath("digits.csv.gz").read_bytes()
    rows = torch.tensor([[int(v) for v in row] for row in csv.reader(gzip.decompress(packed).decode().splitlines())])
    small = rows[:, :64].view(-1, 1, 8, 8).float() * (255 / 16)  # ink from 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8).squeeze(1)
    held_out = torch.arange(len(rows)) % 5 == 0
    train, test = (Split(images[part], rows[part, 64]) for part in (~held_out, held_out))
    return ImageData(train, test, CLASSES["mnist"], "bundled")


def _synthetic(train: int, test: int) -> ImageData:
    """Noise that looks like Fashion-MNIST to a clock: the same bytes on every rank, nothing to learn."""
    generator = torch.Generator().manual_seed(0)
    try:
        torch.empty((train + test) * 28 * 28, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"data.synthetic_train={train}: {train + test} images do not fit into memory") from error
    train_split, test_split = (
        Split(
            torch.randint(0, 256, (size, 28, 28), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for size in (train, test)
    )
    return ImageData(train_split, test_split, CLASSES["mnist"], "generated")


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
