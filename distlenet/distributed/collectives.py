"""Collectives: sums, gathered values, and agreement between all ranks."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors, tensors_in

T = TypeVar("T")

LARGE_BYTES = 2**20
"""A larger tensor of a state is sent by itself, without pickling it."""
PART_BYTES = 2**26
"""Largest part that is sent at once, in bytes: with NCCL, it takes memory on the GPU."""


def has_process_group() -> bool:
    """Return whether ranks can communicate: not in a single process, nor in a dry run, whose process group is fake."""
    return dist.is_initialized() and dist.get_backend() != "fake"


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all ranks, in float64, on the same device. A collective."""
    total = values.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total


def gather(values: Tensor) -> Tensor:
    """Return the ``values`` (n,) of every rank as (world_size, n). A collective."""
    rows = values.new_zeros(dist.get_world_size() * len(values))
    # torch 2.14 renames all_gather_into_tensor to all_gather_single.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(rows, values)
    return rows.view(-1, len(values))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on any rank. A collective, then a host sync."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def all_gather_object(value: T) -> list[T]:
    """Return the ``value`` of every rank. A collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_on_rank_0(value: T) -> list[T]:
    """Return the ``value`` of every rank on rank 0, and an empty list on the others. A collective."""
    values: list[T] = [value] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values if dist.get_rank() == 0 else None, dst=0)
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on every rank. A collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_state(state: T, device: torch.device) -> T:
    """Return rank 0's ``state``, nested tensors on the CPU and other values, on every rank. A collective.

    Large tensors are sent in parts, so that rank 0 needs no second copy in memory, and the others only one. ``device``
    is that of the process group's communication.
    """
    if dist.get_world_size() == 1:
        return state
    outline = broadcast_object(map_tensors(lambda tensor: tensor.to("meta") if _is_large(tensor) else tensor, state))
    received = state if dist.get_rank() == 0 else map_tensors(_allocate, outline)
    for large, tensor in zip(tensors_in(outline), tensors_in(received), strict=True):
        if not large.is_meta:
            continue
        for part in tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).split(PART_BYTES):
            sent = part.to(device)  # the same memory on a CPU
            dist.broadcast(sent, src=0)
            part.copy_(sent)
    return received


def _is_large(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    return dense and tensor.nbytes > LARGE_BYTES


def _allocate(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor


def from_rank_0(compute: Callable[[], T]) -> T:
    """Return what ``compute`` returns on rank 0, on every rank. A collective, if there is a process group.

    Raise a UserError of rank 0 on all ranks.
    """
    if not has_process_group():
        return compute()
    value: T | None = None
    with raise_on_all_ranks():
        value = compute() if dist.get_rank() == 0 else None
    return broadcast_object(value)  # type: ignore[return-value]


def broadcast_from_local_rank_0(value: T | None, env: DistributedEnvironment) -> T:
    """Return the ``value`` of local rank 0 on every rank of its node. A collective.

    Nodes send their values in turn: to gather all at once takes the memory of the largest, times the number of ranks.
    """
    own = value
    for source, (node, local_rank) in enumerate(all_gather_object((env.node_rank, env.local_rank))):
        if local_rank == 0:
            sent = [value if source == env.rank else None]
            dist.broadcast_object_list(sent, src=source)
            own = sent[0] if node == env.node_rank else own
    return own  # type: ignore[return-value]


def hosts_of_ranks() -> list[str]:
    """Return the host name of every rank. A collective."""
    return all_gather_object(socket.gethostname())


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of any rank on all ranks at the end of the block. A collective.

    Otherwise the failed rank exits, and the others wait for it in their next collective.
    """
    message, failure = None, None
    try:
        yield
    except UserError as error:
        message = str(error)
    except Exception as error:  # a bug: this rank raises it, the others report it
        message, failure = f"failed: {type(error).__name__}: {error}", error
    messages = all_gather_object(message)
    if failure is not None:
        raise failure
    for rank, text in enumerate(messages):
        if text is not None:
            raise UserError(text if messages.count(text) == len(messages) else f"rank {rank}: {text}")
