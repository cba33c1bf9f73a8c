"""``data.name=cifar10``: 60,000 images in color of 32×32 pixels, through torchvision's reader."""

import socket
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from distlenet.config.schema import DataConfig
from distlenet.data.download import LOCK_TIMEOUT_S, SOCKET_TIMEOUT_S, is_default
from distlenet.data.sources.opened import OpenedImages, StoredImages
from distlenet.utils.errors import UserError, one_line
from distlenet.utils.mapped_file import share_tensors

DIRECTORY = "cifar-10-batches-py"


def open_cifar10(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:
    """Open CIFAR-10, verified by torchvision; download it only into the default ``data.root``, or with ``fetch``."""
    from filelock import FileLock
    from torchvision.datasets import CIFAR10

    root = Path(config.root)
    download = (fetch or is_default(root)) and not (root / DIRECTORY).is_dir()
    if not download and not (root / DIRECTORY).is_dir():
        raise UserError(
            f"data.name=cifar10: is not in {root / DIRECTORY}; give the data.root that holds it, or python -m "
            f"distlenet.data data.name=cifar10 data.root={root} to download it there"
        )
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)  # torchvision sets none
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".cifar10.lock", timeout=LOCK_TIMEOUT_S):
                CIFAR10(str(root), download=True)
        sets = {split: CIFAR10(str(root), train=split == "train") for split in ("train", "test")}
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        hint = f"put the published {DIRECTORY} into {root}, or run again with a network"
        raise UserError(f"data.name=cifar10: cannot be read or downloaded: {reason}; {hint}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    splits, fingerprint = {}, {}
    for split, images in sets.items():
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2)
        image_file, image_ref = share_tensors([pixels], len(pixels))
        label_file, label_ref = share_tensors([torch.tensor(images.targets, dtype=torch.uint8)], len(pixels))
        stack.enter_context(closing(image_file))
        stack.enter_context(closing(label_file))
        splits[split] = StoredImages(image_ref, label_ref)
        fingerprint[split] = f"{len(pixels)} images of the published files"
    classes = tuple(sets["train"].classes)
    return OpenedImages(str(root / DIRECTORY), classes, splits["train"], splits["test"], fingerprint=fingerprint)
