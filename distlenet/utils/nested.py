"""Nested structures of tensors: tuples and dicts of tensors, and lists with one item per sample."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """Return ``data`` with ``function`` applied to each tensor; other values stay."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, tuple | list | dict):
        return _map_items(lambda item: map_tensors(function, item), data)
    return data


def _map_items(function: Callable[[Any], Any], data: Any) -> Any:
    if isinstance(data, dict):
        return {key: function(item) for key, item in data.items()}
    items = map(function, data)
    return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)  # a named tuple takes arguments


def tensors_in(data: Any) -> Iterator[Tensor]:
    """Yield the tensors of ``data``, in a fixed order."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, tuple | list | dict):
        for item in data.values() if isinstance(data, dict) else data:
            yield from tensors_in(item)


def has_lists(data: Any) -> bool:
    """Return whether ``data`` contains a list, the form of ragged parts."""
    if isinstance(data, tuple | dict):
        return any(map(has_lists, data.values() if isinstance(data, dict) else data))
    return isinstance(data, list)


def count_samples(data: Any) -> int:
    """Return the number of samples of ``data``: the length of its first tensor or list; 0 if there is none."""
    if isinstance(data, tuple | dict):
        items = data.values() if isinstance(data, dict) else data
        return next((count_samples(item) for item in items if not isinstance(item, tuple | dict) or item), 0)
    return len(data)


def nonfinite_samples(data: Any) -> list[int]:
    """Return the positions of the samples of ``data`` that hold NaN or an infinity. Host syncs."""
    samples = [tensors_in(select_samples(data, slice(i, i + 1))) for i in range(count_samples(data))]
    return [i for i, tensors in enumerate(samples) if not all(tensor.isfinite().all() for tensor in tensors)]


def select_samples(data: Any, samples: slice) -> Any:
    """Return some samples of ``data``: tensors, contiguous along the first dimension, and lists are sliced."""
    if isinstance(data, Tensor):
        return data[samples].contiguous()
    if isinstance(data, list):
        return data[samples]
    if isinstance(data, tuple | dict):
        return _map_items(lambda item: select_samples(item, samples), data)
    raise TypeError(f"a batch consists of tensors, lists, tuples and dicts, but holds a {type(data).__name__}")
