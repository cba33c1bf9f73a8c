"""A set of noise, of any size: for clocks, which do not care what is learned."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from typing_extensions import Buffer

from distlenet.data import idx
from distlenet.utils.errors import UserError
from distlenet.utils.mapped_file import SharedFile, in_memory, on_disk

SIDE = 28  # height and width, pixels
AT_ONCE = 2**16  # images made at a time
MOST_IN_MEMORY = 2**20  # images; larger sets are written to a disk, and mapped from there


def open_synthetic(root: Path, train: int, test: int) -> dict[str, SharedFile]:
    """Make the set of ``train`` and ``test`` images, the same bytes each time; a large one once, below ``root``.

    Raises UserError where there is no room, or nothing can be written.
    """
    shapes = dict(zip(idx.FILES, ((train, SIDE, SIDE), (train,), (test, SIDE, SIDE), (test,)), strict=True))
    if train + test <= MOST_IN_MEMORY:
        return {name: in_memory(_noise(shape)) for name, shape in shapes.items()}
    folder = root / f"synthetic-{train}-{test}"
    needed = sum(torch.Size(shape).numel() for shape in shapes.values())
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".synthetic.lock"):
            if not folder.exists():
                if needed > (free := shutil.disk_usage(root).free):
                    raise UserError(
                        f"data.synthetic_train={train}: {train + test} images take {needed:,} bytes, but data.root="
                        f"{root} has {free:,} left; give a smaller number, or another data.root"
                    )
                with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=root) as scratch:
                    for name, shape in shapes.items():
                        _write(Path(scratch) / "set" / name, _noise(shape))
                    (Path(scratch) / "set").rename(folder)
        return {name: on_disk(folder / name) for name in shapes}
    except OSError as error:
        raise UserError(f"data {folder}: cannot be made: {error.strerror or error}; give another data.root") from error


def _noise(shape: tuple[int, ...]) -> Iterator[Buffer]:
    """Yield an IDX file of random images (N, H, W) or random labels (N,), some at a time."""
    generator = torch.Generator().manual_seed(len(shape))
    yield idx.header(shape)
    for start in range(0, shape[0], AT_ONCE):
        size = (min(AT_ONCE, shape[0] - start), *shape[1:])
        yield (
            torch.randint(0, 256 if len(shape) == 3 else 10, size, dtype=torch.uint8, generator=generator).numpy().data
        )


def _write(path: Path, chunks: Iterator[Buffer]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
