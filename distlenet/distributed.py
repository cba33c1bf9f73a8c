"""Who am I among the ranks, on which device, and how do ranks add and agree.

Environment parsing is pure: a mapping in, an immutable record out. Nothing here writes ``os.environ``.
"""

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.errors import RankError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process's place in the job.

    ``init_method`` is what ``torch.distributed.init_process_group`` takes: ``env://`` under torchrun,
    ``tcp://HOST:PORT`` under srun, and None for a process of its own, which needs no address.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    init_method: str | None = None
    own_gpu: bool = False  # this process sees one GPU, its own (srun --gpus-per-task), not all of the node


def world_from_environ(environ: Mapping[str, str]) -> World:
    """Read a process's place from torchrun's variables, else from srun's, else say: one process.

    Only a job step counts as srun's: in a batch script or an salloc shell, SLURM_NTASKS speaks of tasks
    that nobody has started, and a process that waited for them would wait for ever.
    Raises RankError for variables that are missing, not numbers or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in environ]:
            given = "RANK" if "RANK" in environ else "WORLD_SIZE"
            raise RankError(
                f"environment: {given} is set but {', '.join(missing)} is not; start ranks with torchrun, "
                f"or unset {given} for one process"
            )
        rank, local_rank, world_size, local_world_size = (_number(environ, name) for name in names)
        _port(environ)
        node_rank = _number(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // max(1, local_world_size)
        return _checked(World(rank, local_rank, world_size, local_world_size, node_rank, "env://"))
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        world_size, rank, local_rank, node_rank = (
            _number(environ, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        )
        tasks = slurm_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        if node_rank >= len(tasks):
            raise RankError(f"environment: SLURM_NODEID={node_rank} is beyond SLURM_STEP_TASKS_PER_NODE")
        if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") and "MASTER_ADDR" not in environ:
            raise RankError(
                "environment: SLURM_DISTRIBUTION=arbitrary: rank 0 may be on any node; set MASTER_ADDR to its host name"
            )
        host = environ.get("MASTER_ADDR") or slurm_first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = _port(environ) if "MASTER_PORT" in environ else slurm_port(environ)
        init_method = None if world_size == 1 else f"tcp://{host}:{port}"
        own_gpu = "SLURM_GPUS_PER_TASK" in environ
        return _checked(World(rank, local_rank, world_size, tasks[node_rank], node_rank, init_method, own_gpu))
    return World()


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise RankError(f"environment: {name}={value!r}: expected a whole number, at least 0")
    return int(value)


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise RankError(f"environment: MASTER_PORT={port}: expected a port, 1 to 65535")
    return port


def _checked(world: World) -> World:
    if world.rank >= world.world_size:
        raise RankError(f"environment: rank {world.rank} in a world of {world.world_size}: ranks count from 0")
    if world.local_rank >= world.local_world_size:
        raise RankError(
            f"environment: local rank {world.local_rank} among {world.local_world_size} ranks of its node: "
            "local ranks count from 0"
        )
    return world


def slurm_tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's tasks per node: ``2(x3),1`` is [2, 2, 2, 1]."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        raise RankError(f"environment: SLURM_STEP_TASKS_PER_NODE={text!r}: expected counts such as 2(x3),1")
    counts: list[int] = []
    for tasks, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeat or 1)
    return counts


def slurm_first_host(nodelist: str) -> str:
    """Name the first host of a SLURM node list: ``gpu[03-07,11],login1`` is gpu03. Rank 0 runs there."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    if first is None:
        raise RankError(f"environment: SLURM_STEP_NODELIST={nodelist!r}: expected host names")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def slurm_port(environ: Mapping[str, str]) -> int:
    """Pick rank 0's port from the job and its step, so that two jobs on a node do not meet.

    20,000 to 29,999: below Linux's ephemeral range, where any client may sit on a port.
    """
    return 20_000 + (_number(environ, "SLURM_JOB_ID") * 37 + _number(environ, "SLURM_STEP_ID")) % 10_000


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
def process_group(world: World, backend: str, device: torch.device, timeout_s: float) -> Iterator[None]:
    """Join the default process group for the length of a ``with`` block, and leave it on every path.

    Raises RankError where the group does not come together within ``timeout_s`` seconds.
    """
    bound = device if backend == "nccl" else None
    timeout = timedelta(seconds=timeout_s)
    try:
        if world.init_method is None:  # a group of one: no address, no port, no network
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=bound)
        else:
            dist.init_process_group(backend, world.init_method, timeout, world.world_size, world.rank, device_id=bound)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        raise RankError(
            f"rank {world.rank} of {world.world_size} could not join the group at {world.init_method}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    try:
        yield
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


def from_rank_0(value: T) -> T:
    """Return rank 0's ``value`` on every rank. A collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def all_or_none() -> Iterator[None]:
    """Let every rank pass the block, or none: a UserError of one rank is raised on all. A collective.

    Without it a rank whose disk or data is bad leaves, and the others wait for it in their next collective.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text is not None:
            alike = all(other == text for other in messages)
            raise UserError(text if alike else f"rank {rank}: {text}")
