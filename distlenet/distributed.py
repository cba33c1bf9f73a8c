"""How ranks meet, on which device each computes, and how they add and agree."""

import contextlib
import gc
import json
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distlenet.errors import Preempted, RankError, UserError
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


def open_store(world: World, timeout: timedelta) -> Store:
    """Open the job's key-value store: in this process, in torchrun's agent, or in rank 0."""
    if world.init_method is None:  # a group of one: no address, no port, no network
        return cast(Store, HashStore())
    if world.init_method == "env://":
        store, _, _ = next(rendezvous(world.init_method, world.rank, world.world_size, timeout=timeout))
        return cast(Store, store)
    host, _, port = world.init_method.removeprefix("tcp://").rpartition(":")
    # Does not wait for the others: ``meet`` does, which can say who is missing.
    return cast(Store, TCPStore(host, int(port), None, world.rank == 0, timeout, wait_for_workers=False))


def meet(store: Store, world: World, timeout: timedelta) -> Store:
    """Wait until all ranks are here; return the part of the store that is theirs alone.

    torchrun keeps one store over all restarts of the ranks (seen with torch 2.15), so what it holds may be of ranks
    that are dead: their addresses, too, with which a process group would wait for ever. So rank 0 makes a name for
    this start. Each other rank answers under it, with a word of its own that rank 0 must repeat: a name whose
    repeated word is another's is an old one.
    Raises RankError that names the ranks that are not here after ``timeout``.
    """
    deadline, word = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    own = f"{word} {socket.gethostname()}"
    if world.rank == 0:
        here = PrefixStore(f"distlenet/{word}", store)
        here.set(host_key(0), own)
        store.set("distlenet/start", word)
        _wait(here, [host_key(rank) for rank in range(world.world_size)], deadline, world)
        words = {rank: here.get(host_key(rank)).decode().split()[0] for rank in range(world.world_size)}
        here.set("words", json.dumps(words))
        return here
    while True:
        _wait(store, ["distlenet/start"], deadline, world)
        here = PrefixStore(f"distlenet/{store.get('distlenet/start').decode()}", store)
        here.set(host_key(world.rank), own)
        with contextlib.suppress(dist.DistStoreError):  # not yet, or never: then look for a newer name
            here.wait(["words"], timedelta(seconds=1))
            if json.loads(here.get("words")).get(str(world.rank)) == word:
                return here
            time.sleep(0.02)
        if time.monotonic() > deadline:
            _wait(here, [host_key(rank) for rank in range(world.world_size)], deadline, world)
            raise RankError(f"rank {world.rank} of {world.world_size}: rank 0 did not answer")


def _wait(store: Store, keys: list[str], deadline: float, world: World) -> None:
    """Wait for ranks' ``keys``; raise RankError that says whose are missing after ``deadline``."""
    try:
        store.wait(keys, timedelta(seconds=max(0.01, deadline - time.monotonic())))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RankError(
            f"rank {world.rank} of {world.world_size} on {socket.gethostname()}: {ranks_in_words(missing)} did not "
            "come in time (distributed.start_timeout_s); look whether their nodes run, and reach the node of rank 0"
        ) from error


def host_key(rank: int) -> str:
    """Name the entry that a rank makes when it comes."""
    return f"host/{rank}"


def host_of(store: Store, rank: int) -> str:
    """Return the name of a rank's host, as the rank itself said."""
    return store.get(host_key(rank)).decode().partition(" ")[2]


def ranks_in_words(ranks: Sequence[int], most: int = 16) -> str:
    """Write ``rank 3`` or ``ranks 3, 5, 6``, and of very many the first."""
    listed = ", ".join(str(rank) for rank in ranks[:most]) + (f" and {len(ranks) - most} more" * (len(ranks) > most))
    return f"rank{'s' * (len(ranks) != 1)} {listed}"


def meet_all(world: World, start_timeout_s: float) -> Store:
    """Wait until all ranks are here, ``start_timeout_s`` at most; return the part of their store that is this start's.

    Raises RankError where they do not come together.
    """
    start = timedelta(seconds=start_timeout_s)
    with _told(world):
        return meet(open_store(world, start), world, start)


@contextmanager
def _told(world: World) -> Iterator[None]:
    """Turn what torch raises where ranks do not come together into a RankError."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        host, _, port = (world.init_method or "").removeprefix("tcp://").rpartition(":")
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise RankError(
                f"port {port} on {socket.gethostname()} is in use, by another job or what is left of one; "
                "set MASTER_PORT to a free one for all ranks, or end that process"
            ) from error
        raise RankError(
            f"rank {world.rank} of {world.world_size} could not join the others at {host or 'torchrun'}"
            f"{':' * bool(port)}{port}: {str(error).splitlines()[0]}; python -m distlenet.preflight, started in the "
            "same way, says more"
        ) from error


@contextmanager
def process_group(here: Store, world: World, backend: str, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the default process group for the length of a ``with`` block, and leave it on every path.

    ``here`` is what ``meet_all`` returns, ``timeout_s`` how long ranks wait for each other in a collective.
    Raises RankError where the group does not come together.
    """
    with _told(world):
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
