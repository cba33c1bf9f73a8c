"""``data.name=array``: images and labels as NumPy arrays, in one .npz file or in a directory of .npy files."""

import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distlenet.config.schema import DataConfig
from distlenet.data.sources.labels import check_images, check_labels, digest_of
from distlenet.data.sources.opened import OpenedImages, store_images
from distlenet.utils.errors import UserError, one_line

LAYOUT = "train_images, train_labels, test_images and test_labels, and optionally val_images and val_labels"


def open_array(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:  # noqa: ARG001
    """Open the arrays of ``data.root``. Their content is in memory once per node."""
    root = Path(config.root)
    if not root.exists():
        raise UserError(
            f"data.root={root}: does not exist; give a .npz file, or a directory of .npy files, with {LAYOUT}"
        )
    names = {split: (f"{split}_images", f"{split}_labels") for split in ("train", "test", "val")}
    arrays = {name: array for pair in names.values() for name in pair if (array := _read(root, name)) is not None}
    required = [*names["train"], *names["test"], *(names["val"] if arrays.keys() & set(names["val"]) else ())]
    if missing := [name for name in required if name not in arrays]:
        raise UserError(f"data.root={root}: has no {', '.join(missing)}; expected {LAYOUT}")
    classes, splits, fingerprint = 0, {}, {}
    for split, (image_name, label_name) in names.items():
        if image_name not in arrays:
            continue
        images, labels = arrays[image_name], arrays[label_name]
        check_images(f"{root} {image_name}", images)
        check_labels(f"{root} {label_name}", labels, len(images), classes or None)
        classes = classes or int(labels.max()) + 1
        splits[split] = store_images([images], labels, stack)
        fingerprint[split] = f"{len(images)} images {digest_of(images, labels)}"
    names_of_classes = tuple(map(str, range(classes)))
    return OpenedImages(str(root), names_of_classes, splits["train"], splits["test"], splits.get("val"), fingerprint)


def _read(root: Path, name: str) -> Tensor | None:
    """Return one array, or None if there is none of that name. Raise UserError if it cannot be read."""
    try:
        if root.is_dir():
            path = root / f"{name}.npy"
            array = np.load(path, allow_pickle=False) if path.is_file() else None
        else:
            with np.load(root, allow_pickle=False) as file:
                array = file[name] if name in file.files else None
        if array is None:
            return None
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.ascontiguousarray(native))
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = one_line(getattr(error, "strerror", None) or error, 200)
        raise UserError(f"data {root}: {name} cannot be read: {reason}; give a .npz file, or .npy files") from error
