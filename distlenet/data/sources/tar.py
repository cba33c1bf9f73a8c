"""``data.name=tar``: WebDataset shards, tar files of KEY.png (or another image) and KEY.cls, read at byte offsets.

The headers of all shards are read once, at the start. Each image then has an index and is read directly, in any order:
what holds for other data sets (exact order, resuming, other numbers of ranks) holds for shards.
"""

import hashlib
import io
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.decoding import FORMATS, IMAGE_SUFFIXES, UnreadableImage, channels_of, open_image, to_tensor
from distlenet.data.images import COLOR, GREY
from distlenet.data.sources.opened import OpenedImages
from distlenet.utils.errors import UserError

LAYOUT = "ROOT/train/*.tar or ROOT/train-*.tar, the same for test, and optionally for val"


@dataclass(frozen=True)
class Entry:
    """One image in a shard: its key, and where its bytes are."""

    shard: Path
    key: str
    offset: int
    size: int
    label: int

    def read(self) -> bytes:
        """Return the bytes of the image file. Raise OSError."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class TarImages:
    """The images of one split, which are decoded when they are read."""

    entries: tuple[Entry, ...]
    labels: Tensor
    channels: int

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode one image."""
        entry = self.entries[index]
        try:
            image = open_image(io.BytesIO(entry.read()), self.name(index), self.channels)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"data {error}; replace or remove the image") from error
        return to_tensor(image), entry.label

    def name(self, index: int) -> str:
        """Return the shard and the key of an image."""
        return f"{self.entries[index].shard}: {self.entries[index].key}"


def open_tar(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """Read the headers of all shards, in the order of their names; images keep their order inside a shard."""
    root = Path(config.root)
    shards = {split: _find_shards(root, split) for split in ("train", "test", "val")}
    if missing := [split for split in ("train", "test") if not shards[split]]:
        raise UserError(f"data.root={root}: has no shards of {' and '.join(missing)}; expected {LAYOUT}")
    entries = {split: tuple(e for path in paths for e in _index(path)) for split, paths in shards.items() if paths}
    color = any(_is_color(entry) for split in entries.values() for entry in split)
    classes = 1 + max((entry.label for entry in entries["train"]), default=-1)
    images, fingerprint = {}, {}
    for split, found in entries.items():
        if not found or max(entry.label for entry in found) >= classes:
            problem = "contains no images" if not found else f"has labels that the {classes} training classes lack"
            raise UserError(f"data {root}: {split} {problem}; expected KEY.png and KEY.cls in {LAYOUT}")
        labels = torch.tensor([entry.label for entry in found], dtype=torch.int64)
        images[split] = TarImages(found, labels, COLOR if color else GREY)
        lines = "\n".join(f"{e.shard.name} {e.key} {e.offset} {e.size} {e.label}" for e in found)
        fingerprint[split] = f"{len(found)} images {hashlib.sha256(lines.encode()).hexdigest()[:16]}"
    names = tuple(map(str, range(classes)))
    return OpenedImages(str(root), names, images["train"], images["test"], images.get("val"), fingerprint)


def _find_shards(root: Path, split: str) -> list[Path]:
    """Return the shards of a split, sorted by name."""
    return sorted([*root.glob(f"{split}/*.tar"), *root.glob(f"{split}-*.tar")])


def _index(shard: Path) -> list[Entry]:
    """Return the images of a shard in their order. Raise UserError if it is damaged or an image has no label."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key, _, suffix = member.name.removeprefix("./").rpartition(".")
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    places[key] = (member.offset_data, member.size)
                elif suffix == "cls" and (content := archive.extractfile(member)) is not None:
                    labels[key] = int(content.read(32))
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"data {shard}: cannot be read: {error}; expected a tar file with integers in .cls") from error
    for key in places:
        if labels.get(key, -1) < 0:
            raise UserError(f"data {shard}: {key} has no {key}.cls with an integer of at least 0; add it")
    return [Entry(shard, key, offset, size, labels[key]) for key, (offset, size) in places.items()]


def _is_color(entry: Entry) -> bool:
    """Return whether an image is in color, from its header. An unreadable one is reported when it is decoded."""
    try:
        with Image.open(io.BytesIO(entry.read()), formats=FORMATS) as image:
            return channels_of(image) == COLOR
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return False
