"""On which device each rank computes, and how ranks join a group, add and agree."""

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from distlenet.errors import Preempted, RankError, UserError
from distlenet.rendezvous import told
from distlenet.world import World

T = TypeVar("T")


def pick_device(wanted: str, world: World, gpus: int) -> torch.device:
    """Choose this rank's device: the GPU of its local rank, or the CPU where not each local rank has one.

    ``wanted`` is auto, cpu or cuda; ``gpus`` is how many GPUs this process sees.
    Raises RankError where GPUs are asked for and there is not one for each local rank.
    """
    if world.own_gpu and gpus == 1 and wanted != "cpu":
        return torch.device("cuda", 0)
    if wanted == "cpu" or (wanted == "auto" and gpus < world.local_world_size):
        return torch.device("cpu")
    if gpus == 0:
        raise RankError("device=cuda: no GPU is visible to PyTorch here; give device=cpu, or check the driver")
    if gpus < world.local_world_size:
        raise RankError(
            f"device=cuda: {world.local_world_size} ranks on this node but {gpus} visible GPUs; start at most {gpus} "
            "ranks per node, or give device=cpu"
        )
    return torch.device("cuda", world.local_rank)


def pick_backend(wanted: str, device: torch.device) -> str:
    """Choose NCCL for ranks on GPUs of their own, else Gloo.

    Raises UserError where NCCL is asked for and cannot work; it never turns into Gloo silently.
    """
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if wanted == "nccl" and not nccl:
        raise UserError(
            f"distributed.backend=nccl: needs a GPU for every rank and a PyTorch with NCCL, "
            f"but this rank is on {device.type}; give distributed.backend=auto or gloo"
        )
    return ("nccl" if nccl else "gloo") if wanted == "auto" else wanted


@contextmanager
def process_group(here: Store, world: World, backend: str, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the default process group for the length of a ``with`` block, and leave it on every path.

    ``here`` is what ``meet_all`` returns, ``timeout_s`` how long ranks wait for each other in a collective.
    Raises RankError where the group does not come together.
    """
    with told(world):
        dist.init_process_group(
            backend,
            store=PrefixStore("group", here),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    try:
        yield
    except (UserError, Preempted):  # raised on all ranks
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what they were told may still be on its way
        raise
    except BaseException:
        # Others may be inside a collective. Then NCCL's orderly end waits for them for ever, its abort does not.
        if backend == "nccl" and hasattr(dist.distributed_c10d, "_abort_process_group"):
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Gloo's threads end when the last reference to the group goes, which DistributedDataParallel holds
        # in a cycle. A thread that outlives the interpreter aborts it: "terminate called without an active
        # exception", exit status 134 after a run that succeeded.
        gc.collect()


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


def from_rank_0(value: T) -> T:
    """Return rank 0's ``value`` on every rank. A collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_local_rank_0(value: T | None, world: World) -> T:
    """Return the ``value`` of the first rank of this rank's node. A collective."""
    values: list[tuple[int, T | None]] = [(world.node_rank, None)] * world.world_size
    dist.all_gather_object(values, (world.node_rank, value if world.local_rank == 0 else None))
    return next(value for node, value in values if node == world.node_rank and value is not None)


def hosts_of_ranks() -> list[str]:
    """Return the host name of each rank. A collective."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


@contextmanager
def all_or_none() -> Iterator[None]:
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
