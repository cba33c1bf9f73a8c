"""``data.name=cifar10``: 60,000 images in color of 32×32 pixels, through torchvision's reader."""

import http.client
import socket
from contextlib import ExitStack
from pathlib import Path

import torch

from distlenet.config.schema import DataConfig
from distlenet.data.download import LOCK_TIMEOUT_S, SOCKET_TIMEOUT_S, is_default
from distlenet.data.sources.opened import OpenedImages, store_images
from distlenet.utils.errors import UserError, one_line
from distlenet.utils.files import scratch_directory

DIRECTORY = "cifar-10-batches-py"


def open_cifar10(config: DataConfig, stack: ExitStack, fetch: bool) -> OpenedImages:
    """Open CIFAR-10, verified by torchvision; download it only into the default ``data.root``, or with ``fetch``."""
    from torchvision.datasets import CIFAR10

    root = Path(config.root)
    directory = root / DIRECTORY
    if not directory.is_dir():
        if not (fetch or is_default(root)):
            raise UserError(
                f"data.name=cifar10: is not in {directory}; give the data.root that holds it, or python -m "
                f"distlenet.data data.name=cifar10 data.root={root} to download it there"
            )
        _download(root)
    try:
        sets = {split: CIFAR10(str(root), train=split == "train") for split in ("train", "test")}
    except (OSError, RuntimeError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"data.name=cifar10: cannot be read: {reason}; remove {directory} and run again") from error
    splits, fingerprint = {}, {}
    for split, images in sets.items():
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2)
        splits[split] = store_images([pixels], torch.tensor(images.targets, dtype=torch.uint8), stack)
        fingerprint[split] = f"{len(pixels)} images of the published files"
    classes = tuple(sets["train"].classes)
    return OpenedImages(str(directory), classes, splits["train"], splits["test"], fingerprint=fingerprint)


def _download(root: Path) -> None:
    """Download the files into ``root``, unless another process does it first. Other processes see all files or none."""
    from filelock import FileLock
    from torchvision.datasets import CIFAR10

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)  # torchvision sets none
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".cifar10.lock", timeout=LOCK_TIMEOUT_S):
            if not (root / DIRECTORY).is_dir():
                with scratch_directory(root, ".download-cifar10-") as scratch:
                    CIFAR10(str(scratch), download=True)
                    (scratch / DIRECTORY).rename(root / DIRECTORY)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        reason = one_line(error, 200)
        hint = f"put the published {DIRECTORY} into {root}, or run again with a network"
        raise UserError(f"data.name=cifar10: cannot be downloaded: {reason}; {hint}") from error
    finally:
        socket.setdefaulttimeout(timeout)
