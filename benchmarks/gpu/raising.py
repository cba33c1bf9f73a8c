"""A dataset, for ``data.name=gpu.raising:datasets``, that raises an exception in the middle of a training."""

import sys
import time

import torch
from torch import Tensor

from distlenet import Datasets

MESSAGE = "raised on purpose"
SAMPLES, CLASSES = 2048, 10


class Random:
    """Random images, of which the one after the first ``before`` loaded ones raises."""

    def __init__(self, samples: int, before: int | None = None) -> None:
        self.samples, self.left = samples, before
        self.images = torch.randint(0, 256, (samples, 1, 28, 28), dtype=torch.uint8)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one sample. Raise RuntimeError when the limit is reached."""
        if self.left == 0:
            print(f"raised at {time.time()}", file=sys.stderr, flush=True)
            raise RuntimeError(MESSAGE)
        if self.left is not None:
            self.left -= 1
        return self.images[index], index % CLASSES


def datasets(before: int) -> Datasets:
    """Return a training set that raises after ``before`` loaded samples, and a test set."""
    names = list(map(str, range(CLASSES)))
    return Datasets(Random(SAMPLES, before), Random(256), source="random", classes=names)
