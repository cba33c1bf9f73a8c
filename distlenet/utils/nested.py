"""Nested structures of tensors: tuples and dicts of tensors, and lists with one item per sample."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """Return ``data`` with ``function`` applied to each tensor; other values stay."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, tuple | list):
        return type(data)(map_tensors(function, item) for item in data)
    if isinstance(data, dict):
        return {key: map_tensors(function, item) for key, item in data.items()}
    return data


def tensors_in(data: Any) -> Iterator[Tensor]:
    """Yield the tensors of ``data``, in a fixed order."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, tuple | list | dict):
        for item in data.values() if isinstance(data, dict) else data:
            yield from tensors_in(item)


def count_samples(data: Any) -> int:
    """Return the number of samples of ``data``: the length of its first tensor or list."""
    while isinstance(data, tuple | dict):
        data = next(iter(data.values() if isinstance(data, dict) else data))
    return len(data)


def select_samples(data: Any, samples: slice) -> Any:
    """Return some samples of ``data``: tensors, contiguous along the first dimension, and lists are sliced."""
    if isinstance(data, Tensor):
        return data[samples].contiguous()
    if isinstance(data, list):
        return data[samples]
    if isinstance(data, tuple):
        return tuple(select_samples(item, samples) for item in data)
    if isinstance(data, dict):
        return {key: select_samples(item, samples) for key, item in data.items()}
    raise TypeError(f"a batch consists of tensors, lists, tuples and dicts, but holds a {type(data).__name__}")
