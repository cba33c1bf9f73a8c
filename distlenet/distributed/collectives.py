"""On which device each rank computes, and how ranks join a group, add and agree."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError

T = TypeVar("T")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all ranks, in float64 and on their device. A collective."""
    total = values.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total


def gather(values: Tensor) -> Tensor:
    """Return the ``values`` (n,) of each rank, (W, n). A collective."""
    rows = values.new_zeros(dist.get_world_size() * len(values))
    # The second name is that of torch before 2.14, which the first replaces.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(rows, values)
    return rows.view(-1, len(values))


def any_rank(flag: bool, device: torch.device) -> bool:
    """Say whether ``flag`` is true on any rank. A collective, then a host sync."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on every rank. A collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_from_local_rank_0(value: T | None, env: DistributedEnvironment) -> T:
    """Return the ``value`` of the first rank of this rank's node. A collective."""
    values: list[tuple[int, T | None]] = [(env.node_rank, None)] * env.world_size
    dist.all_gather_object(values, (env.node_rank, value if env.local_rank == 0 else None))
    return next(value for node, value in values if node == env.node_rank and value is not None)


def hosts_of_ranks() -> list[str]:
    """Return the host name of each rank. A collective."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Let every rank pass the block, or none: a UserError of one rank is raised on all. A collective.

    Without it a rank whose disk or data is bad leaves, and the others wait for it in their next collective.
    """
    message, failure = None, None
    try:
        yield
    except UserError as error:
        message = str(error)
    except Exception as error:  # no mistake of the user's: here the traceback, for the others that there is one
        message, failure = f"failed: {type(error).__name__}: {error}", error
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if failure is not None:
        raise failure
    for rank, text in enumerate(messages):
        if text is not None:
            alike = all(other == text for other in messages)
            raise UserError(text if alike else f"rank {rank}: {text}")
