"""What the facts of all ranks mean: a pure function from what was seen to the lines of the table."""

from collections.abc import Callable, Sequence
from functools import partial

from distlenet.config.schema import Config
from distlenet.distributed.rendezvous import format_ranks
from distlenet.preflight.finding import Finding
from distlenet.preflight.rank_info import Facts

SKEW_S = 1.0
"""Clocks that differ by more put the logs of a failure in a wrong order."""

NCCL_SHM = 32 << 20
"""Bytes of shared memory that NCCL is given for each rank of a node."""


def judge(facts: Sequence[Facts], clocks: Sequence[float], config: Config, batch_bytes: int) -> list[Finding]:
    """Judge what all ranks saw by themselves.

    ``clocks`` is by how much each rank's is ahead of rank 0's, seconds; ``batch_bytes`` what a loader's worker hands
    over at a time.
    """
    return [
        versions(facts),
        settings(facts),
        devices(facts),
        cores(facts),
        names(facts),
        clock(facts, clocks),
        shared_memory(facts, config.data.num_workers, batch_bytes),
        open_files(facts),
    ]


def versions(facts: Sequence[Facts]) -> Finding:
    """Are all versions alike?"""
    listed = {name: _by_value(facts, partial(_version, name)) for name in facts[0].versions}
    differing = [f"{name} {_where(values)}" for name, values in listed.items() if len(values) > 1]
    if differing:
        return Finding("versions", "FAIL", "; ".join(differing), "install the same environment on every node")
    return Finding("versions", "ok", ", ".join(f"{name} {value}" for name, value in facts[0].versions.items()))


def _version(name: str, facts: Facts) -> str:
    return facts.versions.get(name, "none")


def settings(facts: Sequence[Facts]) -> Finding:
    """Do all ranks have the same settings?"""
    found = _by_value(facts, lambda f: f.settings)
    if len(found) > 1:
        return Finding("settings", "FAIL", f"differ: {_where(found)}", "start every rank with the same arguments")
    return Finding("settings", "ok", f"the same on {count(len(facts), 'rank')}")


def devices(facts: Sequence[Facts]) -> Finding:
    """Has each rank a device of its own, and all the same kind of it?"""
    refused = _by_value([f for f in facts if f.refused], lambda f: f.refused)
    if refused:
        return Finding(
            "devices", "FAIL", _where(refused), "give another device=, or start as many ranks as there are GPUs"
        )
    used = _by_value([f for f in facts if f.gpu], lambda f: f"{f.host} {f.gpu}")
    if double := {gpu: ranks for gpu, ranks in used.items() if len(ranks) > 1}:
        gpu, ranks = next(iter(double.items()))
        return Finding(
            "devices",
            "FAIL",
            f"{format_ranks([f.rank for f in ranks])} share one GPU, {gpu}",
            "let each rank see all GPUs of its node, or on SLURM give --gpus-per-task=1; look at CUDA_VISIBLE_DEVICES",
        )
    kinds = _by_value(facts, lambda f: f"{f.device.partition(':')[0]}, {f.backend}, {f.precision}")
    if len(kinds) > 1:
        return Finding("devices", "FAIL", _where(kinds), "give device=, or mend the nodes whose GPUs are not seen")
    if any(f.gpus and not f.gpu for f in facts):
        idle = [f for f in facts if f.gpus and not f.gpu]
        return Finding("devices", "note", f"GPUs stand idle on {_hosts(idle)}", "start a rank per GPU")
    return Finding("devices", "ok", next(iter(kinds)))


def cores(facts: Sequence[Facts]) -> Finding:
    """Have the threads of a node's ranks processors to run on?"""
    crowded = [f for f in facts if f.local_rank == 0 and f.threads * f.local_world_size > f.cores]
    if crowded:
        f = crowded[0]
        return Finding(
            "processors",
            "note",
            f"{count(f.local_world_size * f.threads, 'thread')} on {count(f.cores, 'core')} of {_hosts(crowded)}",
            "start fewer ranks, set OMP_NUM_THREADS lower, or give SLURM more --cpus-per-task",
        )
    return Finding(
        "processors", "ok", f"{count(facts[0].cores, 'core')} for {count(facts[0].local_world_size, 'rank')} of a node"
    )


def names(facts: Sequence[Facts]) -> Finding:
    """Will other nodes find each node?"""
    nodes = [f for f in facts if f.local_rank == 0]
    if len(nodes) == 1:
        return Finding("names", "ok", f"one node, {nodes[0].host}")
    gloo = [f for f in nodes if f.backend == "gloo"]
    if lost := [f for f in gloo if not f.address]:
        by = f"GLOO_SOCKET_IFNAME={lost[0].pinned}" if lost[0].pinned else "its own name"
        return Finding(
            "names",
            "FAIL",
            f"no address is found by {by} on {_hosts(lost)}",
            f"set GLOO_SOCKET_IFNAME={lost[0].interface or 'INTERFACE'} there, or add the name to /etc/hosts",
        )
    if trapped := [f for f in gloo if f.loopback]:
        f = trapped[0]
        return Finding(
            "names",
            "FAIL",
            f"{_hosts(trapped)} resolves to {f.address}, which no other node can reach",
            f"set GLOO_SOCKET_IFNAME={f.interface or 'INTERFACE'} for the job, or mend /etc/hosts there",
        )
    shown = ", ".join(f"{f.host} {f.pinned or f.interface} {f.address}" for f in nodes[:4])
    return Finding("names", "ok", shown + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""))


def clock(facts: Sequence[Facts], clocks: Sequence[float]) -> Finding:
    """Do clocks agree?"""
    ahead = max(zip(clocks, facts, strict=True), key=lambda pair: abs(pair[0]))
    if abs(ahead[0]) > SKEW_S:
        where = f"{ahead[1].host} is {abs(ahead[0]):.1f} s {'ahead of' if ahead[0] > 0 else 'behind'} {facts[0].host}"
        return Finding("clocks", "FAIL", where, "run chrony or another time service on every node")
    return Finding("clocks", "ok", f"within {max(0.01, abs(ahead[0])):.2f} s")


def shared_memory(facts: Sequence[Facts], workers: int, batch_bytes: int) -> Finding:
    """Is /dev/shm large enough for what ranks hand over there?"""

    def needed(f: Facts) -> int:
        return f.local_world_size * (workers * 2 * batch_bytes + (NCCL_SHM if f.backend == "nccl" else 0))

    if short := [f for f in facts if f.shm_bytes < needed(f)]:
        f = short[0]
        return Finding(
            "shared memory",
            "FAIL",
            f"/dev/shm has {_mb(f.shm_bytes)} free on {_hosts(short)}, its ranks need {_mb(needed(f))}",
            "give the container more (docker run --shm-size=8g, or --ipc=host), or data.num_workers=0",
        )
    return Finding("shared memory", "ok", f"{_mb(min(f.shm_bytes for f in facts))} free in /dev/shm")


def open_files(facts: Sequence[Facts]) -> Finding:
    """May a rank have a connection to each other one?"""
    needed = 256 + 2 * len(facts)
    if short := [f for f in facts if f.open_files < needed]:
        return Finding(
            "open files",
            "FAIL",
            f"a process may have {short[0].open_files} on {_hosts(short)}, {len(facts)} ranks need {needed}",
            f"ulimit -n {needed}, or LimitNOFILE of the service that starts the ranks",
        )
    return Finding("open files", "ok", f"{min(f.open_files for f in facts):,} allowed")


def count(number: int, thing: str) -> str:
    """Write ``1 rank``, ``2 ranks``."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _by_value(facts: Sequence[Facts], value: Callable[[Facts], str]) -> dict[str, list[Facts]]:
    found: dict[str, list[Facts]] = {}
    for each in facts:
        found.setdefault(value(each), []).append(each)
    return found


def _where(values: dict[str, list[Facts]]) -> str:
    return ", ".join(
        f"{value} ({format_ranks([f.rank for f in of], most=4)} on {_hosts(of)})" for value, of in values.items()
    )


def _hosts(facts: Sequence[Facts]) -> str:
    hosts = list(dict.fromkeys(f.host for f in facts))
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")


def _mb(count: int) -> str:
    return f"{count / 10**6:,.0f} MB"
