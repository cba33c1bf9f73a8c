"""Random images and labels in any number, for measurements of speed."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from typing_extensions import Buffer

from distlenet.data import idx
from distlenet.utils.errors import UserError
from distlenet.utils.files import scratch_directory
from distlenet.utils.mapped_file import SharedFile, create_shared, open_shared

CHUNK_IMAGES = 2**16  # images generated at a time
MAX_IMAGES_IN_MEMORY = 2**20  # larger sets are written to a disk and mapped


def open_synthetic(root: Path, train: int, test: int) -> dict[str, SharedFile]:
    """Return files with ``train`` and ``test`` images, always the same; a large set is written below ``root`` once.

    Raise UserError if the disk has too little space or cannot be written.
    """
    shapes = dict(zip(idx.FILES, ((train, 28, 28), (train,), (test, 28, 28), (test,)), strict=True))
    if train + test <= MAX_IMAGES_IN_MEMORY:
        return {name: create_shared(_random_file(shape)) for name, shape in shapes.items()}
    directory = root / f"synthetic-{train}-{test}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".synthetic.lock"):
            if not directory.exists():
                with scratch_directory(root, ".synthetic-") as scratch:
                    if (needed := sum(map(math.prod, shapes.values()))) > (free := shutil.disk_usage(root).free):
                        raise UserError(
                            f"data.synthetic_train={train}: {train + test} images take {needed:,} bytes, but data.root="
                            f"{root} has {free:,} free; give a smaller number, or another data.root"
                        )
                    complete = scratch / "complete"
                    complete.mkdir()
                    for name, shape in shapes.items():
                        with (complete / name).open("wb") as file:
                            file.writelines(_random_file(shape))
                            file.flush()
                            os.fsync(file.fileno())
                    complete.rename(directory)
        return {name: open_shared(directory / name) for name in shapes}
    except OSError as error:
        failure = f"cannot be written: {error.strerror or error}"
        raise UserError(f"data {directory}: {failure}; give another data.root") from error


def _random_file(shape: tuple[int, ...]) -> Iterator[Buffer]:
    """Yield an IDX file of random images (N, H, W) or labels (N,) in chunks."""
    generator = torch.Generator().manual_seed(len(shape))
    high = 256 if len(shape) == 3 else 10
    yield idx.header(shape)
    for start in range(0, shape[0], CHUNK_IMAGES):
        size = (min(CHUNK_IMAGES, shape[0] - start), *shape[1:])
        yield torch.randint(0, high, size, dtype=torch.uint8, generator=generator).numpy().data
