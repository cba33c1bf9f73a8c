"""The ranks and sizes of this process, read from the variables of torchrun, srun, mpirun or an Indexed Job."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from distlenet.utils.errors import RankError


@dataclass(frozen=True)
class DistributedEnvironment:
    """One process of the job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str = ""  # host of the store for the rendezvous; empty for a single process
    master_port: int = 0
    agent_store: bool = False  # the store is in torchrun's agent, not in rank 0

    def __str__(self) -> str:
        """Return the name of this rank in messages."""
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def read_environment(environ: Mapping[str, str]) -> DistributedEnvironment:
    """Return the environment that torchrun has set, else that of mpirun, srun or a pod, else that of a single process.

    srun counts only inside a job step: a batch script and an salloc shell have SLURM_NTASKS, but no started tasks.
    Inside a SLURM job, mpirun starts its daemons with srun, so its ranks also have the variables of that step. srun
    itself sets only PMI_RANK and PMI_SIZE of mpirun's variables (``--mpi=pmi2``). A pod of an Indexed Job always has
    JOB_COMPLETION_INDEX, also if torchrun starts its ranks; WORLD_SIZE is then that of the pod, without RANK.
    Raise RankError if a variable is missing, is not an integer, or contradicts another one.
    """
    if "RANK" in environ or ("WORLD_SIZE" in environ and "JOB_COMPLETION_INDEX" not in environ):
        env = _from_torchrun(environ)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        env = _from_open_mpi(environ)
    elif "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        env = _from_hydra(environ)
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        env = _from_srun(environ)
    elif "PMI_RANK" in environ:  # another launcher: report what it does not set
        env = _from_hydra(environ)
    elif "JOB_COMPLETION_INDEX" in environ:
        env = _from_indexed_job(environ)
    else:
        return DistributedEnvironment()
    if env.rank >= env.world_size:
        wrong = f"rank {env.rank} of {env.world_size} ranks (RANK, WORLD_SIZE)"
    elif env.local_world_size > env.world_size:
        wrong = f"{env.local_world_size} ranks on this node (LOCAL_WORLD_SIZE), but {env.world_size} in all"
    elif env.local_rank >= env.local_world_size:
        wrong = f"local rank {env.local_rank} of {env.local_world_size} ranks (LOCAL_RANK, LOCAL_WORLD_SIZE)"
    else:
        return env
    raise RankError(f"environment: {wrong}: ranks are numbered from 0; start them with torchrun, srun or mpirun")


def _from_torchrun(environ: Mapping[str, str]) -> DistributedEnvironment:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    if missing := ", ".join(name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)):
        given = "RANK" if "RANK" in environ else "WORLD_SIZE"
        raise RankError(f"environment: {given} is set, but not {missing}; start ranks with torchrun, or unset {given}")
    rank, local_rank, world_size, local_world_size = (read_int(environ, name) for name in names)
    address = environ["MASTER_ADDR"], read_int(environ, "MASTER_PORT", 1, 65535)
    agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    node_rank = read_int(environ, "GROUP_RANK") if "GROUP_RANK" in environ else rank // max(1, local_world_size)
    return DistributedEnvironment(rank, local_rank, world_size, local_world_size, node_rank, *address, agent_store)


def _from_srun(environ: Mapping[str, str]) -> DistributedEnvironment:
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID")
    rank, local_rank, world_size, node_rank = (read_int(environ, name) for name in names)
    tasks = slurm_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), world_size)
    if node_rank >= len(tasks):
        raise RankError(f"environment: SLURM_NODEID={node_rank}: only {len(tasks)} nodes have tasks; srun sets it")
    address = _srun_address(environ) if world_size > 1 else ("", 0)
    return DistributedEnvironment(rank, local_rank, world_size, tasks[node_rank], node_rank, *address)


def _srun_address(environ: Mapping[str, str]) -> tuple[str, int]:
    if environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary") and "MASTER_ADDR" not in environ:
        raise RankError("environment: SLURM_DISTRIBUTION=arbitrary: set MASTER_ADDR to the host of rank 0")
    port = read_int(environ, "MASTER_PORT", 1, 65535) if "MASTER_PORT" in environ else slurm_port(environ)
    return environ.get("MASTER_ADDR") or slurm_first_host(environ.get("SLURM_STEP_NODELIST", "")), port


def _from_open_mpi(environ: Mapping[str, str]) -> DistributedEnvironment:
    names = (f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE"))
    return _from_mpirun(environ, tuple(names), "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500")


def _from_hydra(environ: Mapping[str, str]) -> DistributedEnvironment:
    """Return the environment of MPICH's and Intel MPI's mpirun."""
    names = ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
    return _from_mpirun(environ, names, "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500")


def _from_mpirun(environ: Mapping[str, str], names: tuple[str, ...], command: str) -> DistributedEnvironment:
    """Return the environment with rank, local rank, size and local size from the variables ``names``."""
    if missing := ", ".join(name for name in names if not environ.get(name)):
        fix = f"start ranks with mpirun, srun or torchrun, or unset {names[0]}"
        raise RankError(f"environment: {names[0]} is set, but not {missing}; {fix}")
    rank, local_rank = (read_int(environ, name) for name in names[:2])
    world_size, local_world_size = (read_int(environ, name, 1) for name in names[2:])
    if world_size == 1:
        return DistributedEnvironment(rank, local_rank, world_size, local_world_size)
    if missing := ", ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)):
        fix = f"give the host of rank 0 and a free port: {command}"
        raise RankError(f"environment: {names[2]}={world_size}, but {missing} is not set: mpirun sets none; {fix}")
    if world_size % local_world_size or rank % local_world_size != local_rank:
        raise RankError(
            f"environment: {names[0]}={rank}, {names[1]}={local_rank}: nodes have unequal numbers of ranks, or ranks "
            "of a node do not follow each other; place them by slot, such as mpirun --map-by slot"
        )
    address = environ["MASTER_ADDR"], read_int(environ, "MASTER_PORT", 1, 65535)
    return DistributedEnvironment(rank, local_rank, world_size, local_world_size, rank // local_world_size, *address)


def _from_indexed_job(environ: Mapping[str, str]) -> DistributedEnvironment:
    """Return the environment of a pod of a Kubernetes Indexed Job without a launcher: it is one rank."""
    rank = read_int(environ, "JOB_COMPLETION_INDEX")
    given = f"environment: JOB_COMPLETION_INDEX={rank}"
    if not environ.get("WORLD_SIZE"):
        if rank == 0:
            return DistributedEnvironment()  # a Job of one pod
        raise RankError(
            f"{given}, but neither a launcher nor WORLD_SIZE is set, so each pod would run alone; start the ranks "
            "with python -m distlenet.launch, as launch/kubernetes/job.yaml does, or set WORLD_SIZE, "
            "MASTER_ADDR=NAME-0.SERVICE and MASTER_PORT in the pod; for one run per pod, unset JOB_COMPLETION_INDEX"
        )
    world_size = read_int(environ, "WORLD_SIZE", 1)
    if rank >= world_size:
        raise RankError(f"{given}, but WORLD_SIZE={world_size}; set WORLD_SIZE to the completions of the Job")
    if world_size == 1:
        return DistributedEnvironment()
    if missing := ", ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)):
        fix = "set MASTER_ADDR=NAME-0.SERVICE and MASTER_PORT=29500 in the pod"
        raise RankError(f"{given} and WORLD_SIZE={world_size}, but {missing} is not set; {fix}")
    address = environ["MASTER_ADDR"], read_int(environ, "MASTER_PORT", 1, 65535)
    return DistributedEnvironment(rank, 0, world_size, 1, rank, *address)


def read_int(environ: Mapping[str, str], name: str, minimum: int = 0, maximum: int = 2**32 - 1) -> int:
    """Return a variable as an integer; SLURM's IDs have 32 bits. Raise RankError if it is none or out of range."""
    value = environ.get(name, "")
    if re.fullmatch("[0-9]{1,10}", value) and minimum <= int(value) <= maximum:
        return int(value)
    expected = f"an integer, {minimum} to {maximum}"
    raise RankError(f"environment: {name}={value!r}: expected {expected}; the launcher sets it")


def threads_from_environ(environ: Mapping[str, str]) -> int | None:
    """Return the first number in OMP_NUM_THREADS, or None if it is not set. Raise RankError if it is invalid."""
    if (value := environ.get("OMP_NUM_THREADS")) is None:
        return None
    if not re.fullmatch(r" *[1-9][0-9]{0,3} *(,.*)?", value):
        raise RankError(f"environment: OMP_NUM_THREADS={value!r}: expected an integer, 1 to 9999; correct or unset it")
    return int(value.partition(",")[0])


def slurm_tasks_per_node(text: str, world_size: int) -> list[int]:
    """Expand SLURM's tasks per node, at most ``world_size`` entries: ``2(x3),1`` is [2, 2, 2, 1]."""
    given = f"environment: SLURM_STEP_TASKS_PER_NODE={text[:100]!r}"
    if not re.fullmatch(r"\d{1,9}(\(x\d{1,9}\))?(,\d{1,9}(\(x\d{1,9}\))?)*", text):
        raise RankError(f"{given}: expected counts such as 2(x3),1; srun sets it")
    counts: list[int] = []
    for tasks, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        if len(counts) + int(repeat or 1) > world_size:
            raise RankError(f"{given}: more nodes than the {world_size} tasks of SLURM_STEP_NUM_TASKS; srun sets both")
        counts += [int(tasks)] * int(repeat or 1)
    return counts


def slurm_first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list, which runs rank 0: ``gpu[03-07,11],login1`` gives gpu03."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    if first is None:
        raise RankError(f"environment: SLURM_STEP_NODELIST={nodelist!r}: expected host names; srun sets it")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def slurm_port(environ: Mapping[str, str]) -> int:
    """Return a port for each job and step, 20,000 to 29,999: any client may use Linux's ephemeral ports above."""
    return 20_000 + (read_int(environ, "SLURM_JOB_ID") * 37 + read_int(environ, "SLURM_STEP_ID")) % 10_000
