"""Check the structure of a loaded state. A file with a valid checksum may still contain anything."""

from typing import Any

from torch import Tensor

MAX_COUNT = 2**53
"""Integers of a state are counts, of steps or images, below this bound."""


def check_same_structure(value: Any, like: Any, name: str) -> None:
    """Raise ValueError, naming the first difference, unless ``value`` has the structure of ``like``.

    Dicts have the same keys, sequences the same lengths, tensors the same shapes and dtypes. Integers are from 0 to
    2**53. None in ``like`` also accepts a string.
    """
    if not _matches(value, like):
        raise ValueError(f"{name} is {_summary(value)}, expected something like {_summary(like)}")
    if isinstance(like, dict):
        for key in like:
            check_same_structure(value[key], like[key], f"{name}.{key}")
    elif isinstance(like, list | tuple):
        for index, (item, like_item) in enumerate(zip(value, like, strict=True)):
            check_same_structure(item, like_item, f"{name}[{index}]")


def _matches(value: Any, like: Any) -> bool:
    match like:
        case Tensor():
            return isinstance(value, Tensor) and value.dtype == like.dtype and value.shape == like.shape
        case dict():
            return isinstance(value, dict) and value.keys() == like.keys()
        case list() | tuple():
            return isinstance(value, list | tuple) and len(value) == len(like)
        case bool():
            return isinstance(value, bool)
        case int():
            return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) or (value is None and like is None)


def _summary(value: Any) -> str:
    return f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)[:60]
