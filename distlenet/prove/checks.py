"""The result of a check, and comparisons of two computations of the same samples."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distlenet.utils.errors import UserError
from distlenet.utils.nested import tensors_in

CONTRACT = "contract.json"
"""The file with the result of the direct checks."""


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    cause: str | None  # a key of CAUSES; None: it holds
    detail: str = ""
    hook: str = ""  # if the cause names none


class HookError(Exception):
    """An exception in a hook."""

    def __init__(self, hook: str, text: str) -> None:
        super().__init__(text)
        self.hook = hook


class ShapeError(Exception):
    """A hook returned something other than one value per sample."""


@contextmanager
def hook(name: str) -> Iterator[None]:
    """Convert an exception of the user's code into a HookError that names the hook."""
    try:
        yield
    except (UserError, ShapeError):
        raise
    except Exception as error:
        raise HookError(name, f"{type(error).__name__}: {error}") from error


def spoil_generators(seed: int) -> None:
    """Seed the global generators, for each call with another seed: what draws from them is found."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def check_shape(name: str, values: Any, n: int) -> None:
    """Raise ShapeError unless ``values`` is a tensor with one value for each of ``n`` samples."""
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ShapeError(f"{name}: expected shape ({n},) for {n} samples, got {got}")


def compare_digests(names: Sequence[str], first: Sequence[str], second: Sequence[str]) -> str | None:
    """Return which names have two different digests, or None."""
    found = [name for name, one, other in zip(names, first, second, strict=True) if one != other]
    return f"{len(found)} of {len(names)} differ, first {found[0]}" if found else None


def compare_values(first: Tensor, second: Tensor, tolerance: float) -> str | None:
    """Return the first of n samples whose values (n, m) differ by more than ``tolerance``, or None.

    The tolerance is relative to the value, or absolute if that is below 1.
    """
    allowed = tolerance * torch.maximum(first.abs(), torch.ones_like(first))
    close = ((first - second).abs() <= allowed) | (first == second) | (first.isnan() & second.isnan())
    if bool(close.all()):
        return None
    row, column = (~close).nonzero()[0].tolist()
    values = f"{float(first[row, column]):.7g} and {float(second[row, column]):.7g}"
    return f"{int((~close).any(1).sum())} of {len(close)} differ, first number {row} of the batch: {values}"


def outputs_differ(first: Any, second: Any, tolerance: float) -> bool:
    """Return whether the model's outputs for the same samples differ by more than ``tolerance``."""
    for one, other in zip(tensors_in(first), tensors_in(second), strict=True):
        if one.shape != other.shape or compare_values(_column(one), _column(other), tolerance):
            return True
    return False


def _column(tensor: Tensor) -> Tensor:
    return tensor.double().reshape(-1, 1)
