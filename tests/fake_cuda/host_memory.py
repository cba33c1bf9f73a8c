"""CPU tensors that share the memory of CUDA tensors: the fake's device memory is memory of the host."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_VIEWS: dict[tuple[Any, ...], Tensor] = {}
MOST_VIEWS = 20_000
CPU = torch.device("cpu")


def host(tensor: Tensor) -> Tensor:
    """Return a CPU tensor of the same memory; a tensor of the CPU itself."""
    if not tensor.is_cuda:
        return tensor
    size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
    if tensor.numel() == 0:
        return torch.empty_strided(size, stride, dtype=dtype)
    key = (tensor.data_ptr(), size, stride, dtype)
    view = _VIEWS.get(key)
    if view is None:
        if len(_VIEWS) >= MOST_VIEWS:
            _VIEWS.clear()
        elements = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), CPU, elements * dtype.itemsize)
        view = _VIEWS[key] = torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)
    return view


def host_value(value: Any) -> Any:
    """Return an argument of an operator with the CPU for CUDA."""
    if isinstance(value, Tensor):
        return host(value)
    if isinstance(value, list | tuple):
        return type(value)(host_value(part) for part in value)
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def flat(value: Any) -> list[Tensor]:
    """Return the tensors in a tensor or nested sequences."""
    return list(_tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
