"""The rules that turn the RankInfo of all ranks into findings. Pure functions."""

from collections.abc import Iterable, Sequence

from distlenet.config.schema import Config
from distlenet.data.sources.sizing import wanted_size
from distlenet.distributed.rendezvous import format_ranks
from distlenet.preflight.finding import Finding, pluralize
from distlenet.preflight.rank_info import RankInfo

MAX_CLOCK_SKEW_S = 1.0
"""With a larger skew, the logs of a failure cannot be put in order."""

NCCL_SHM_BYTES = 32 << 20
"""Shared memory that NCCL needs for each rank of a node."""


def apply_rules(ranks: Sequence[RankInfo], clocks: Sequence[float], config: Config) -> list[Finding]:
    """Check what the ranks observed; ``clocks`` are their times in seconds at the same moment."""
    findings = [check(ranks) for check in (check_versions, check_settings, check_devices, check_cores, check_names)]
    return [*findings, check_clocks(ranks, clocks), check_shared_memory(ranks, config), check_open_files(ranks)]


def check_versions(ranks: Sequence[RankInfo]) -> Finding:
    """Check that all ranks run the same versions."""
    groups = {package: _group((r.versions.get(package, "none"), r) for r in ranks) for package in ranks[0].versions}
    if mismatches := [f"{package} {_format_groups(group)}" for package, group in groups.items() if len(group) > 1]:
        return Finding("versions", "FAIL", "; ".join(mismatches), "install the same environment on every node")
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in ranks[0].versions.items()))


def check_settings(ranks: Sequence[RankInfo]) -> Finding:
    """Check that all ranks have the same settings."""
    groups = _group((r.settings, r) for r in ranks)
    if len(groups) > 1:
        return Finding(
            "settings", "FAIL", f"differ: {_format_groups(groups)}", "start all ranks with the same arguments"
        )
    return Finding("settings", "ok", f"identical on {pluralize(len(ranks), 'rank')}")


def check_devices(ranks: Sequence[RankInfo]) -> Finding:
    """Check that each rank has a device, and that all devices are of one type."""
    if errors := _group((r.device_error, r) for r in ranks if r.device_error):
        return Finding("devices", "FAIL", _format_groups(errors))
    types = _group((f"{r.device.partition(':')[0]}, {r.backend}, {r.precision}", r) for r in ranks)
    if len(types) > 1:
        return Finding("devices", "FAIL", _format_groups(types), "give device=, or make all GPUs visible to all ranks")
    if ranks[0].device_warning:
        return Finding("devices", "note", ranks[0].device_warning)
    if unused := [r for r in ranks if r.visible_gpus and r.device == "cpu"]:
        return Finding("devices", "note", f"GPUs are not used on {_format_hosts(unused)}", "set device=auto")
    return Finding("devices", "ok", next(iter(types)))


def check_cores(ranks: Sequence[RankInfo]) -> Finding:
    """Check that the threads of a node's ranks do not exceed its cores."""
    if crowded := [r for r in ranks if r.local_rank == 0 and r.threads * r.local_world_size > r.cores]:
        threads = pluralize(crowded[0].local_world_size * crowded[0].threads, "thread")
        found = f"{threads} on {pluralize(crowded[0].cores, 'core')} of {_format_hosts(crowded)}"
        hint = "start fewer ranks, set OMP_NUM_THREADS lower, or give SLURM more --cpus-per-task"
        return Finding("CPU cores", "note", found, hint)
    cores, local_ranks = pluralize(ranks[0].cores, "core"), pluralize(ranks[0].local_world_size, "rank")
    return Finding("CPU cores", "ok", f"{cores} for {local_ranks} per node")


def check_names(ranks: Sequence[RankInfo]) -> Finding:
    """Check that each node publishes an address that the other nodes can reach."""
    nodes = [r for r in ranks if r.local_rank == 0]
    if len(nodes) == 1:
        return Finding("names", "ok", f"one node, {nodes[0].host}")
    gloo_nodes = [r for r in nodes if r.backend == "gloo"]  # NCCL chooses interfaces itself
    if unresolved := [r for r in gloo_nodes if not r.address]:
        ifname, interface = unresolved[0].socket_ifname, unresolved[0].interface or "INTERFACE"
        source = f"GLOO_SOCKET_IFNAME={ifname}" if ifname else "the host name"
        hint = f"set GLOO_SOCKET_IFNAME={interface} there, or add the name to /etc/hosts"
        return Finding("names", "FAIL", f"{source} has no address on {_format_hosts(unresolved)}", hint)
    if unreachable := [r for r in gloo_nodes if r.is_loopback]:
        address, interface = unreachable[0].address, unreachable[0].interface or "INTERFACE"
        found = f"{_format_hosts(unreachable)} resolves to {address}, which no other node can reach"
        hint = f"set GLOO_SOCKET_IFNAME={interface} for the job, or fix /etc/hosts there"
        return Finding("names", "FAIL", found, hint)
    return Finding("names", "ok", shorten([f"{r.host} {r.socket_ifname or r.interface} {r.address}" for r in nodes]))


def check_clocks(ranks: Sequence[RankInfo], clocks: Sequence[float]) -> Finding:
    """Check that the clocks of all nodes agree, by one rank of each: a busy node delays its ranks by seconds."""
    nodes = [(c - clocks[0], r.host) for c, r in zip(clocks, ranks, strict=True) if r.local_rank == 0]
    offset, host = max(nodes, key=lambda node: abs(node[0]))
    if abs(offset) > MAX_CLOCK_SKEW_S:
        found = f"{host} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} {ranks[0].host}"
        return Finding("clocks", "FAIL", found, "run chrony or another time service on every node")
    return Finding("clocks", "ok", f"within {max(0.01, abs(offset)):.2f} s")


def _bytes_per_image(config: Config) -> int:
    """Return the size of a sample: in color if ``data.size`` is given, else that of LeNet's input."""
    height, width = wanted_size(config.data) or (32, 32)
    pairs = config.data.mixup > 0 or config.data.cutmix > 0
    return height * width * (3 if config.data.size else 1) * (2 if pairs else 1)


def check_shared_memory(ranks: Sequence[RankInfo], config: Config) -> Finding:
    """Check that /dev/shm is large enough for loader workers, each of which holds two batches, and NCCL."""
    batch_bytes = -(-config.train.global_batch_size // len(ranks)) * _bytes_per_image(config)

    def needed(r: RankInfo) -> int:
        return r.local_world_size * (config.data.num_workers * 2 * batch_bytes + NCCL_SHM_BYTES * (r.backend == "nccl"))

    if short := [r for r in ranks if r.shm_bytes < needed(r)]:
        free = f"/dev/shm has {short[0].shm_bytes / 1e6:,.0f} MB free on {_format_hosts(short)}"
        hint = "give the container more (docker run --shm-size=8g, or --ipc=host), or data.num_workers=0"
        return Finding("shared memory", "FAIL", f"{free}, its ranks need {needed(short[0]) / 1e6:,.0f} MB", hint)
    return Finding("shared memory", "ok", f"{min(r.shm_bytes for r in ranks) / 1e6:,.0f} MB free in /dev/shm")


def check_open_files(ranks: Sequence[RankInfo]) -> Finding:
    """Check that each rank may open a connection to every other rank."""
    needed = 256 + 2 * len(ranks)
    if limited := [r for r in ranks if r.open_files < needed]:
        found = f"the limit is {limited[0].open_files} on {_format_hosts(limited)}, {len(ranks)} ranks need {needed}"
        hint = f"run ulimit -n {needed}, or set LimitNOFILE of the service that starts the ranks"
        return Finding("open files", "FAIL", found, hint)
    return Finding("open files", "ok", f"{min(r.open_files for r in ranks):,} allowed")


def shorten(items: Sequence[str], separator: str = ", ") -> str:
    """Join the first four items, and count the rest."""
    return separator.join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _group(pairs: Iterable[tuple[str, RankInfo]]) -> dict[str, list[RankInfo]]:
    groups: dict[str, list[RankInfo]] = {}
    for value, rank in pairs:
        groups.setdefault(value, []).append(rank)
    return groups


def _format_groups(groups: dict[str, list[RankInfo]]) -> str:
    return ", ".join(
        f"{value} ({format_ranks([r.rank for r in group], 4)} on {_format_hosts(group)})"
        for value, group in groups.items()
    )


def _format_hosts(ranks: Sequence[RankInfo]) -> str:
    return shorten(list(dict.fromkeys(r.host for r in ranks)))
