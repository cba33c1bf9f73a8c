"""``data.name=folder``: image files, a directory per class: ROOT/train/CLASS/*.png, ROOT/test/..., maybe ROOT/val."""

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.sources.opened import OpenedImages
from distlenet.images.decoding import COLOR, GREY, IMAGE_SUFFIXES, UnreadableImage, is_color, open_image
from distlenet.utils.errors import UserError

LAYOUT = "image files in ROOT/train/CLASS/ and ROOT/test/CLASS/, and optionally ROOT/val/CLASS/"


@dataclass(frozen=True)
class FolderImages:
    """Image files of one split, which are decoded when they are read."""

    directory: Path
    files: tuple[str, ...]  # relative to the directory
    labels: Tensor
    channels: int
    stats: Tensor  # int64 (N, 2): size in bytes, modification time in ns

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """Decode one image."""
        path = self.directory / self.files[index]
        try:
            return open_image(path, path, self.channels)
        except UnreadableImage as error:
            raise UserError(f"data {error}; replace or remove the file") from error

    @property
    def file_bytes(self) -> int:
        """The size of all files."""
        return int(self.stats[:, 0].sum())

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return name, size and modification time of files."""
        stats = self.stats[start:stop].tolist()
        return [f"{file} {stat}" for file, stat in zip(self.files[start:stop], stats, strict=True)]

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.directory / self.files[index])


def open_folder(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """List the image files of ``data.root``, in the order of their names, whatever the order of the file system."""
    try:
        return _open(Path(config.root))
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        raise UserError(f"data {error.filename or config.root}: {reason}; replace or remove it") from error


def _open(root: Path) -> OpenedImages:
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such directory; expected {LAYOUT}")
    missing = [name for name in ("train", "test") if not (root / name).is_dir()]
    if missing:
        raise UserError(f"data.root={root}: has no directory {' and '.join(missing)}; expected {LAYOUT}")
    splits = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    classes = _class_names(root / "train")
    listed = {split: _list_files(root / split, classes) for split in splits}
    if empty := sorted(set(range(len(classes))) - {label for _, label in listed["train"]}):
        raise UserError(f"data {root / 'train' / classes[empty[0]]}: has no images; add some or remove the directory")
    color = any(is_color(root / split / file) for split in splits for file, _ in listed[split])
    images, fingerprint = {}, {"classes": ", ".join(classes)}
    for split, files in listed.items():
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        names = tuple(file for file, _ in files)
        statuses = [(root / split / file).stat() for file in names]
        stats = torch.tensor([(status.st_size, status.st_mtime_ns) for status in statuses], dtype=torch.int64)
        images[split] = FolderImages(root / split, names, labels, COLOR if color else GREY, stats)
        sizes = "\n".join(f"{file} {status.st_size}" for file, status in zip(names, statuses, strict=True))
        fingerprint[split] = (
            f"{len(names)} files {hashlib.sha256(sizes.encode(errors='surrogateescape')).hexdigest()[:16]}"
        )
    return OpenedImages(str(root), classes, images["train"], images["test"], images.get("val"), fingerprint)


def _class_names(directory: Path) -> tuple[str, ...]:
    """Return the sorted names of the directories. Raise UserError if there are none."""
    names = tuple(sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != "."))
    if not names:
        raise UserError(f"data {directory}: contains no directory per class; expected {LAYOUT}")
    return names


def _list_files(directory: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return the files and labels of a split, sorted by the name within the class, then by the class."""
    if unknown := sorted(set(_class_names(directory)) - set(classes)):
        raise UserError(f"data {directory}: class {unknown[0]} is not in the training set; add it there, or remove it")
    if missing := [name for name in classes if not (directory / name).is_dir()]:
        raise UserError(f"data {directory}: class {missing[0]} has no directory; add it, also if it contains no images")
    found = []
    for label, name in enumerate(classes):
        for place, _, files in os.walk(directory / name, onerror=_raise):
            paths = [Path(place, file) for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
            found += [(str(path.relative_to(directory / name)), label) for path in paths]
    if not found:
        raise UserError(f"data {directory}: contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [(f"{classes[label]}/{file}", label) for file, label in sorted(found)]


def _raise(error: OSError) -> None:
    raise error
