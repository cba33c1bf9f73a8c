"""``data.name=tar``: WebDataset shards, tar files of KEY.png (or another image) and KEY.cls, read at byte offsets.

Each image has an index and is read directly, in any order: what holds for other data sets (exact order, resuming, other
numbers of ranks) holds for shards.
"""

import hashlib
import io
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.sources.labels import MAX_CLASSES
from distlenet.data.sources.opened import OpenedImages
from distlenet.data.sources.shard_index import Entry, read_shards
from distlenet.images.decoding import COLOR, GREY, UnreadableImage, open_image
from distlenet.utils.errors import UserError

LAYOUT = "ROOT/train/*.tar or ROOT/train-*.tar, the same for test, and optionally for val"


@dataclass(frozen=True)
class TarImages:
    """The images of one split, which are decoded when they are read."""

    entries: tuple[Entry, ...]
    labels: Tensor
    channels: int
    shard_stamps: dict[Path, tuple[int, int]]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.entries)

    def image(self, index: int) -> Image.Image:
        """Decode one image."""
        entry = self.entries[index]
        try:
            return open_image(io.BytesIO(entry.read()), self.name(index), self.channels)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"data {error}; replace or remove the image") from error

    @property
    def file_bytes(self) -> int:
        """The size of all image files."""
        return sum(entry.size for entry in self.entries)

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return the places of images in their shards, with sizes and modification times of the shards."""
        return [
            f"{each.shard.name} {self.shard_stamps[each.shard]} {each.key} {each.offset} {each.size}"
            for each in self.entries[start:stop]
        ]

    def name(self, index: int) -> str:
        """Return the shard and the key of an image."""
        return f"{self.entries[index].shard}: {self.entries[index].key}"


def open_tar(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """Find the images of all shards, in the order of the shards' names and of the images inside a shard."""
    root = Path(config.root)
    shards = {split: _find_shards(root, split) for split in ("train", "test", "val")}
    if missing := [split for split in ("train", "test") if not shards[split]]:
        raise UserError(f"data.root={root}: has no shards of {' and '.join(missing)}; expected {LAYOUT}")
    contents = read_shards(root, [path for paths in shards.values() for path in paths])
    color = any(shard.color for shard in contents.values())
    entries = {split: tuple(e for p in paths for e in contents[p].entries) for split, paths in shards.items() if paths}
    classes = 1 + max((entry.label for entry in entries["train"]), default=-1)
    if classes > MAX_CLASSES:
        raise UserError(f"data {root}: has labels up to {classes - 1}; expected integers from 0, below {MAX_CLASSES:,}")
    images, fingerprint = {}, {}
    for split, found in entries.items():
        if not found or max(entry.label for entry in found) >= classes:
            problem = "contains no images" if not found else f"has labels that the {classes} training classes lack"
            raise UserError(f"data {root}: {split} {problem}; expected KEY.png and KEY.cls in {LAYOUT}")
        labels = torch.tensor([entry.label for entry in found], dtype=torch.int64)
        stamps = {shard: contents[shard].stamp for shard in shards[split]}
        images[split] = TarImages(found, labels, COLOR if color else GREY, stamps)
        lines = "\n".join(f"{e.shard.name} {e.key} {e.offset} {e.size} {e.label}" for e in found)
        fingerprint[split] = (
            f"{len(found)} images {hashlib.sha256(lines.encode(errors='surrogateescape')).hexdigest()[:16]}"
        )
    names = tuple(map(str, range(classes)))
    return OpenedImages(str(root), names, images["train"], images["test"], images.get("val"), fingerprint)


def _find_shards(root: Path, split: str) -> list[Path]:
    """Return the shards of a split, sorted by name."""
    return sorted([*root.glob(f"{split}/*.tar"), *root.glob(f"{split}-*.tar")])
