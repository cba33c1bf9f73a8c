"""``data.cache``: the images that are decoded into a cache file, its place, and what its name depends on."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import features

from distlenet.config.schema import DataConfig
from distlenet.data.cache_file import CacheFile
from distlenet.data.sources.joined import Joined
from distlenet.data.sources.opened import ImageFiles, OpenedImages, StoredImages
from distlenet.data.sources.sizing import MAX_DECODED_BYTES, ResizedImages, first_shape, wanted_size
from distlenet.utils.errors import UserError, warn
from distlenet.utils.mapped_file import TensorRef, open_shared, share_tensors

VERSION = 3  # of the format and of the decoder
MIN_FILE_BYTES = 2**24  # auto: smaller image files are decoded in about a second


@dataclass(frozen=True)
class JoinedImages(Joined[ResizedImages]):
    """The images of all splits; ``files`` are the same ones, not resized."""

    files: Sequence[ImageFiles]
    thread_safe = True

    def name(self, index: int) -> str:
        """Return how messages call an image."""
        part, own_index = self.locate(index)
        return f"data {part.name(own_index)}"

    def stamps(self, start: int, stop: int) -> list[str]:
        """Return the stamps of image files."""
        found: list[str] = []
        for files in self.files:
            found += files.stamps(max(start, 0), max(stop, 0))
            start, stop = start - len(files), stop - len(files)
        return found


def join_images(opened: OpenedImages, config: DataConfig) -> JoinedImages:
    """Return the images of all splits, resized to ``data.size``."""
    size = wanted_size(config)
    shape = first_shape(opened.train, size)
    files = list(_image_files(opened).values())
    return JoinedImages([ResizedImages(split, split.labels, size, shape) for split in files], files)


def plan_cache(opened: OpenedImages, config: DataConfig) -> CacheFile | None:
    """Return the file that stores the decoded images, or None if they are not cached.

    Its name contains a digest of the image files, of ``data.size`` and of the decoder's version. Raise UserError if the
    first image is damaged.
    """
    splits = _image_files(opened)
    if not splits or config.cache == "off":
        return None
    joined = join_images(opened, config)
    shape = joined.parts[0].shape
    image_bytes = torch.Size(shape).numel()
    small = sum(split.file_bytes for split in splits.values()) < MIN_FILE_BYTES
    if config.cache == "auto" and small and max(map(len, joined.parts)) * image_bytes <= MAX_DECODED_BYTES:
        return None
    root = os.path.abspath(config.root)
    settings = [joined.files[0].channels, shape, root]
    stamps = [(name, split.stamps(0, len(split))) for name, split in splits.items()]
    path, part = cache_paths(config, Path(root).name, settings, stamps)
    return CacheFile(path, part, len(joined), shape)


def cache_paths(config: DataConfig, name: str, settings: Any, contents: Any) -> tuple[Path, Path]:
    """Return the paths of a complete and of an incomplete cache file: only the first depends on ``contents``."""
    decoder = [PIL.__version__, *map(features.version, ("jpg", "webp", "libtiff", "zlib"))]
    settings = [VERSION, decoder, wanted_size(config), config.name, settings]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:40] or "root"
    directory = cache_directory(config)
    path, part = (directory / f"{name}-{_digest(values)}.images" for values in ([settings, contents], settings))
    return path, part


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def cache_directory(config: DataConfig) -> Path:
    """Return the directory that ``data.cache`` names; of auto, the user's cache directory."""
    if config.cache != "auto":
        return Path(os.path.abspath(os.path.expanduser(config.cache)))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "distlenet"


def is_usable(file: CacheFile, problem: str, config: DataConfig) -> bool:
    """Return whether the file was written. If a ``problem`` has prevented it, warn.

    Raise UserError then if ``data.cache`` is a directory.
    """
    if problem and config.cache != "auto":
        raise UserError(f"data.cache={config.cache}: {problem}; give another directory, or data.cache=off")
    if problem:
        warn(
            f"data.cache=auto: {file.path.parent}: {problem}; the images are decoded again by each job: give "
            "data.cache=DIRECTORY on another disk"
        )
    return not problem


def use_cache(
    opened: OpenedImages, file: CacheFile | None, problem: str, config: DataConfig, stack: ExitStack
) -> OpenedImages:
    """Return ``opened`` with the images of the complete ``file``, if ``is_usable``. Raise UserError as that."""
    if file is None or not is_usable(file, problem, config):
        return opened
    shared = stack.enter_context(closing(open_shared(file.path)))
    first, splits = 0, dict[str, Any]()
    for name, split in _image_files(opened).items():
        images = TensorRef(shared.ref, first * file.image_bytes, (len(split), *file.shape), torch.uint8)
        label_file, labels = share_tensors([split.labels], len(split))
        stack.enter_context(closing(label_file))
        sampled = len(split) * file.image_bytes > MAX_DECODED_BYTES
        splits[name] = StoredImages(images, labels, sampled)
        first += len(split)
    return replace(opened, **splits)


def _image_files(opened: OpenedImages) -> dict[str, ImageFiles]:
    """Return the splits that are image files, by name."""
    splits = {name: getattr(opened, name) for name in ("train", "test", "validation")}
    return {name: split for name, split in splits.items() if hasattr(split, "stamps")}
