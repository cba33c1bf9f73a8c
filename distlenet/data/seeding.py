"""Seed the global generators of torch, Python and numpy for each sample of a map-style dataset.

A random transform in ``__getitem__`` then draws the same numbers for a sample in any process: a rank or a loader
worker, before and after a restart.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from distlenet.task import MapDataset
from distlenet.utils.sample_keys import SampleKeys

EVALUATION_EPOCH = -1
"""Stands for the epoch in the keys of an evaluation: every evaluation of a set has the same samples."""

GENERATORS = ("torch", "random", "numpy")


def load_samples(dataset: MapDataset, keys: SampleKeys) -> list[Any]:
    """Return the samples at ``keys.indices``, each loaded with generators that are seeded by its key.

    The generators of this process are unchanged afterwards. CUDA's generators are neither seeded nor restored.
    """
    seeds = (keys.split(f"generator of {name}").bits().tolist() for name in GENERATORS)
    with preserved_generators():
        return [_load(dataset, index, *each) for index, *each in zip(keys.indices.tolist(), *seeds, strict=True)]


def _load(dataset: MapDataset, index: int, torch_seed: int, random_seed: int, numpy_seed: int) -> Any:
    # About 5 µs. torch.manual_seed would seed CUDA's generators, too.
    torch.default_generator.manual_seed(torch_seed)
    random.seed(random_seed)
    np.random.seed(numpy_seed)
    return dataset[index]


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the states of the three generators on the CPU when the ``with`` block ends."""
    torch_state, random_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)
