"""Is a loaded state built like the one it is to replace? A file that is whole may still hold anything."""

from typing import Any

from torch import Tensor

MOST = 2**53
"""Whole numbers of a state are below it: what counts steps or images does not grow beyond."""


def check_same_structure(value: Any, like: Any, name: str) -> None:
    """Raise ValueError, naming the first place, where ``value`` is not built like ``like``.

    Dicts have the same keys and lists the same lengths, tensors the same shapes and types; numbers are numbers, the
    whole ones from 0 to 2**53; None stands for a text that may be missing.
    """
    if isinstance(like, Tensor):
        fits = isinstance(value, Tensor) and value.dtype == like.dtype and value.shape == like.shape
    elif isinstance(like, dict):
        fits = isinstance(value, dict) and value.keys() == like.keys()
    elif isinstance(like, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(like)
    elif isinstance(like, bool):
        fits = isinstance(value, bool)
    elif isinstance(like, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST
    elif isinstance(like, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = isinstance(value, str) or (value is None and like is None)
    if not fits:
        raise ValueError(f"{name} is {_short(value)}, expected something like {_short(like)}")
    if isinstance(like, dict):
        for key in like:
            check_same_structure(value[key], like[key], f"{name}.{key}")
    elif isinstance(like, list | tuple):
        for number, (mine, other) in enumerate(zip(value, like, strict=True)):
            check_same_structure(mine, other, f"{name}[{number}]")


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return repr(value)[:60]
