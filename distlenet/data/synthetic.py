"""A set of noise, of any size, in IDX files: for clocks, which do not care what is learned."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from distlenet.data import idx
from distlenet.errors import UserError

SIDE = 28  # height and width, pixels
AT_ONCE = 2**16  # images made at a time


def locate_or_make(root: Path, train: int, test: int) -> dict[str, Path]:
    """Find the set of ``train`` and ``test`` images below ``root``, or write it; the same bytes on every machine.

    Raises UserError where there is no room, or nothing can be written.
    """
    folder = root / f"synthetic-{train}-{test}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".synthetic.lock"):
            if not folder.exists():
                needed, free = (train + test) * (SIDE * SIDE + 1), shutil.disk_usage(root).free
                if needed > free:
                    raise UserError(
                        f"data.synthetic_train={train}: {train + test} images take {needed:,} bytes, but data.root="
                        f"{root} has {free:,} left; give a smaller number, or another data.root"
                    )
                with tempfile.TemporaryDirectory(prefix=".synthetic-", dir=root) as scratch:
                    made = Path(scratch) / "made"
                    _write(made, train, test)
                    made.rename(folder)
    except OSError as error:
        raise UserError(f"data.root={root}: cannot be written: {error.strerror or error}") from error
    files = idx.find(folder)
    if files is None:
        raise UserError(f"data: {folder} holds no data set; remove it and run again")
    return files


def _write(folder: Path, train: int, test: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = ((train, SIDE, SIDE), (train,), (test, SIDE, SIDE), (test,))
    for name, shape in zip(idx.FILES, shapes, strict=True):
        with (folder / name).open("wb") as file:
            file.write(idx.header(shape))
            for part in _noise(shape, 256 if len(shape) == 3 else 10, generator):
                file.write(part.numpy().data)
            file.flush()
            os.fsync(file.fileno())


def _noise(shape: tuple[int, ...], values: int, generator: torch.Generator) -> Iterator[Tensor]:
    for start in range(0, shape[0], AT_ONCE):
        size = (min(AT_ONCE, shape[0] - start), *shape[1:])
        yield torch.randint(0, values, size, dtype=torch.uint8, generator=generator)
