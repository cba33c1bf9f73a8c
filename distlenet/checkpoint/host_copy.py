"""Copy a state to host memory, the only part of a save for which training stops."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from distlenet.utils.nested import map_tensors, tensors_in


def copy_to_host(state: Any, previous: Any = None) -> Any:
    """Return a copy of ``state`` in host memory, in the tensors of a ``previous`` copy if they fit. A host sync.

    New memory costs a page fault per 4 KiB, which take several times as long as the copy itself. The memory is
    pageable: pinned blocks are rounded up to a power of two bytes, and would take up to twice the state.
    """
    spare = defaultdict(list)
    for tensor in tensors_in(previous):
        spare[_form(tensor)].append(tensor)

    def copy(tensor: Tensor) -> Tensor:
        fitting = spare[_form(tensor)]
        return fitting.pop().copy_(tensor.detach()) if fitting else tensor.detach().to("cpu", copy=True)

    return map_tensors(copy, state)


def memory_for(state: Any) -> Any:
    """Return a ``previous`` copy for ``copy_to_host``: written with zeros, so that no page faults are left."""
    return map_tensors(lambda tensor: torch.zeros_like(tensor, device="cpu"), state)


def _form(tensor: Tensor) -> Any:
    """Return what two tensors of the same form share; a sparse tensor fits no other."""
    strided = tensor.layout == torch.strided
    return (tensor.shape, tensor.dtype, tensor.stride()) if strided else id(tensor)
