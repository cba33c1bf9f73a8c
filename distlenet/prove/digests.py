"""Digests of the samples in a batch, each of which depends on one sample only."""

import hashlib
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DIGITS = 16
"""Hexadecimal digits of a digest: two different samples have the same one with a chance of 2**-64."""


def digest(value: Any) -> str:
    """Return the digest of any value: of its type, shape and content."""
    hasher = hashlib.sha256()
    _update(hasher, value)
    return hasher.hexdigest()[:DIGITS]


def _update(hasher: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
        hasher.update(_rows(value.unsqueeze(0)).tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        hasher.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        hasher.update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, tuple | list):
        hasher.update(f"{len(value)} items".encode())
        for item in value:
            _update(hasher, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            hasher.update(f"{key!r}: ".encode())
            _update(hasher, item)
    elif isinstance(value, str | bytes | int | float | bool | None):
        hasher.update(f"{type(value).__name__} {value!r}".encode())
    else:
        hasher.update(pickle.dumps(value))


def sample_digests(data: Any, n: int) -> list[str]:
    """Return the digest of each sample of ``data``: tensors, the sample first, and lists, in tuples and dicts."""
    hashers = [hashlib.sha256() for _ in range(n)]
    _update_samples(hashers, data)
    return [hasher.hexdigest()[:DIGITS] for hasher in hashers]


def _update_samples(hashers: Sequence[Any], data: Any) -> None:
    if isinstance(data, Tensor):
        head, rows = f"{data.dtype} {tuple(data.shape[1:])}".encode(), _rows(data)
        for hasher, row in zip(hashers, rows, strict=True):
            hasher.update(head + row.tobytes())
    elif isinstance(data, list):
        for hasher, item in zip(hashers, data, strict=True):
            _update(hasher, item)
    elif isinstance(data, tuple | dict):
        for item in data.values() if isinstance(data, dict) else data:
            _update_samples(hashers, item)
    else:
        raise TypeError(f"a batch consists of tensors, lists, tuples and dicts, but holds a {type(data).__name__}")


def _rows(tensor: Tensor) -> Any:
    """Return the bytes of each row of a tensor, as a numpy array (n, bytes)."""
    values = tensor.detach().to("cpu").contiguous()
    return values.reshape(len(values), -1 if values.numel() else 0).view(torch.uint8).numpy()


def take(data: Any, positions: Sequence[int]) -> Any:
    """Return the samples of ``data`` at ``positions``, in that order."""
    if isinstance(data, Tensor):
        return data[torch.tensor(positions, dtype=torch.int64, device=data.device)]
    if isinstance(data, list):
        return [data[position] for position in positions]
    if isinstance(data, dict):
        return {key: take(item, positions) for key, item in data.items()}
    if isinstance(data, tuple):
        items = [take(item, positions) for item in data]
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    raise TypeError(f"a batch consists of tensors, lists, tuples and dicts, but holds a {type(data).__name__}")


def is_per_sample(data: Any, n: int) -> bool:
    """Return whether each tensor and list in ``data`` has ``n`` items."""
    if isinstance(data, Tensor):
        return data.dim() > 0 and len(data) == n
    if isinstance(data, list):
        return len(data) == n
    if isinstance(data, tuple | dict):
        return all(is_per_sample(item, n) for item in (data.values() if isinstance(data, dict) else data))
    return False
