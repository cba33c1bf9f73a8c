"""Who am I among the ranks: read from the environment that a launcher left.

Pure: a mapping in, an immutable record out. Nothing here writes ``os.environ``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from distlenet.utils.errors import RankError


@dataclass(frozen=True)
class DistributedEnvironment:
    """One process's place in the job.

    ``init_method`` says where the ranks meet, in the words of ``torch.distributed``: ``env://`` in the store of
    torchrun's agent, ``tcp://HOST:PORT`` in rank 0, and None for a process of its own, which needs no address.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    init_method: str | None = None
    own_gpu: bool = False  # this process sees one GPU, its own (srun --gpus-per-task), not all of the node


def read_environment(environ: Mapping[str, str]) -> DistributedEnvironment:
    """Read a process's place from torchrun's variables, else from srun's, else say: one process.

    Only a job step counts as srun's: in a batch script or an salloc shell, SLURM_NTASKS speaks of tasks
    that nobody has started, and a process that waited for them would wait for ever.
    Raises RankError for variables that are missing, not numbers or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]:
            given = "RANK" if "RANK" in environ else "WORLD_SIZE"
            raise RankError(
                f"environment: {given} is set, but not {', '.join(missing)}; start ranks with torchrun, "
                f"or unset {given} for one process"
            )
        rank, local_rank, world_size, local_world_size = (read_int(environ, name) for name in names)
        port = _port(environ)
        agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        init_method = "env://" if agent else f"tcp://{environ['MASTER_ADDR']}:{port}"
        node_rank = read_int(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // max(1, local_world_size)
        return _checked(DistributedEnvironment(rank, local_rank, world_size, local_world_size, node_rank, init_method))
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        world_size, rank, local_rank, node_rank = (
            read_int(environ, name)
            for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
        )
        tasks = slurm_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), most=world_size)
        if node_rank >= len(tasks):
            raise RankError(
                f"environment: SLURM_NODEID={node_rank}: SLURM_STEP_TASKS_PER_NODE has only {len(tasks)} nodes; "
                "srun sets both"
            )
        if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") and "MASTER_ADDR" not in environ:
            raise RankError(
                "environment: SLURM_DISTRIBUTION=arbitrary: rank 0 may be on any node; set MASTER_ADDR to its host name"
            )
        host = environ.get("MASTER_ADDR") or slurm_first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = _port(environ) if "MASTER_PORT" in environ else slurm_port(environ)
        address = None if world_size == 1 else f"tcp://{host}:{port}"
        own_gpu = "SLURM_GPUS_PER_TASK" in environ
        return _checked(
            DistributedEnvironment(rank, local_rank, world_size, tasks[node_rank], node_rank, address, own_gpu)
        )
    return DistributedEnvironment()


def read_int(environ: Mapping[str, str], name: str) -> int:
    """Read a whole number from the environment. Raises RankError where it is none."""
    value = environ.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise RankError(f"environment: {name}={value!r}: expected a whole number, at least 0; torchrun and srun set it")
    return int(value)


def threads_from_environ(environ: Mapping[str, str]) -> int | None:
    """Read OMP_NUM_THREADS, a number or a list of which the first counts; None where it is not set.

    Raises RankError where it is neither: OpenMP would take a number of its own.
    """
    value = environ.get("OMP_NUM_THREADS")
    if value is None:
        return None
    if not re.fullmatch(r" *[1-9][0-9]{0,3} *(,.*)?", value):
        raise RankError(f"environment: OMP_NUM_THREADS={value!r}: expected a whole number, 1 to 9999; or unset it")
    return int(value.partition(",")[0])


def _port(environ: Mapping[str, str]) -> int:
    port = read_int(environ, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise RankError(f"environment: MASTER_PORT={port}: expected a port, 1 to 65535; give a free one")
    return port


def _checked(env: DistributedEnvironment) -> DistributedEnvironment:
    if env.rank >= env.world_size:
        raise RankError(
            f"environment: rank {env.rank} of {env.world_size} ranks (RANK, WORLD_SIZE): they count from 0; "
            "torchrun and srun number them"
        )
    if env.local_world_size > env.world_size:
        raise RankError(
            f"environment: {env.local_world_size} ranks on this node (LOCAL_WORLD_SIZE), but {env.world_size} in "
            "all (WORLD_SIZE); torchrun and srun set both"
        )
    if env.local_rank >= env.local_world_size:
        raise RankError(
            f"environment: local rank {env.local_rank} of {env.local_world_size} ranks on its node (LOCAL_RANK, "
            "LOCAL_WORLD_SIZE): they count from 0; torchrun and srun number them"
        )
    return env


def slurm_tasks_per_node(text: str, most: int) -> list[int]:
    """Expand SLURM's tasks per node: ``2(x3),1`` is [2, 2, 2, 1]; each of up to ``most`` nodes has a task."""
    given = f"environment: SLURM_STEP_TASKS_PER_NODE={text[:100]!r}"
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", text):
        raise RankError(f"{given}: expected counts such as 2(x3),1; srun sets it")
    counts: list[int] = []
    for tasks, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        if len(counts) + int(repeat or 1) > most:
            raise RankError(f"{given}: more nodes than the {most} tasks of SLURM_STEP_NUM_TASKS; srun sets both")
        counts += [int(tasks)] * int(repeat or 1)
    return counts


def slurm_first_host(nodelist: str) -> str:
    """Name the first host of a SLURM node list: ``gpu[03-07,11],login1`` is gpu03. Rank 0 runs there."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    if first is None:
        raise RankError(f"environment: SLURM_STEP_NODELIST={nodelist!r}: expected host names; srun sets it")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def slurm_port(environ: Mapping[str, str]) -> int:
    """Pick rank 0's port from the job and its step, so that two jobs on a node do not meet.

    20,000 to 29,999: below Linux's ephemeral range, where any client may sit on a port.
    """
    return 20_000 + (read_int(environ, "SLURM_JOB_ID") * 37 + read_int(environ, "SLURM_STEP_ID")) % 10_000


number = read_int  # until distlenet.training uses the new name
