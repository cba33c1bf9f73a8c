"""The checks that run before there is a process group: ranks exchange their results through the job's store."""

import contextlib
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.config.schema import Config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import format_ranks
from distlenet.preflight.finding import Finding
from distlenet.preflight.node_checks import NodeReport, apply_node_rules, check_node, token_path
from distlenet.preflight.ports import publish_listener
from distlenet.preflight.rank_info import RankInfo, collect_rank_info, read_clock, source_address
from distlenet.preflight.rules import apply_rules
from distlenet.tasks.image_transform import SIZE
from distlenet.utils.errors import RankError


def run_node_checks(config: Config, env: DistributedEnvironment, store: Store, wait_s: float) -> list[Finding]:
    """Check every rank, and the ports, disks and data of every node.

    Each rank publishes its RankInfo, and the first rank of each node a NodeReport; rank 0 applies the rules. Return
    the findings on every rank. Raise RankError if a rank does not answer.
    """
    info = collect_rank_info(config, env)
    store.set(f"info/{env.rank}", json.dumps(asdict(info)))
    listener = None
    if env.local_rank == 0:
        reachable = "" if info.is_loopback else info.address
        address = reachable or source_address(env.master_addr) or "127.0.0.1"
        listener = publish_listener(store, env.node_rank, address)
    if env.rank == 0:
        wait_for_ranks(store, "info", range(env.world_size), wait_s)
    nonce = broadcast(store, env, "nonce", secrets.token_hex(4), 2 * wait_s)
    store.set(f"clock/{env.rank}", json.dumps(read_clock()))  # at the same time on all ranks
    try:
        if env.local_rank == 0:
            num_nodes = get_rank_info(store, env.world_size - 1).node_rank + 1
            report = check_node(config, info, num_nodes, store, nonce, wait_s)
            store.set(f"node/{env.rank}", json.dumps(asdict(report)))
        findings = apply_all_rules(config, env, store, wait_s) if env.rank == 0 else []
        # Every node keeps its listener and token until all nodes have reported.
        findings = broadcast_findings(store, env, "node findings", findings, 5 * wait_s)
    finally:
        if env.local_rank == 0:
            with contextlib.suppress(OSError):
                token_path(config, nonce, env.node_rank).unlink()
        if listener is not None:
            listener.close()
    return findings


def apply_all_rules(config: Config, env: DistributedEnvironment, store: Store, wait_s: float) -> list[Finding]:
    """Wait for the results of all ranks and nodes, and turn them into findings."""
    ranks = range(env.world_size)
    wait_for_ranks(store, "clock", ranks, wait_s)
    clocks = [json.loads(store.get(f"clock/{rank}")) for rank in ranks]
    infos = [get_rank_info(store, rank) for rank in ranks]
    first_ranks = [info.rank for info in infos if info.local_rank == 0]
    wait_for_ranks(store, "node", first_ranks, 3 * wait_s)
    nodes = [NodeReport(**json.loads(store.get(f"node/{rank}"))) for rank in first_ranks]
    batch_bytes = -(-config.train.global_batch_size // env.world_size) * SIZE * SIZE
    findings = apply_rules(infos, [clock - clocks[0] for clock in clocks], config, batch_bytes)
    return findings + apply_node_rules(nodes, config)


def get_rank_info(store: Store, rank: int) -> RankInfo:
    """Return the RankInfo that a rank has published."""
    return RankInfo(**json.loads(store.get(f"info/{rank}")))


def broadcast(store: Store, env: DistributedEnvironment, name: str, value: Any, wait_s: float) -> Any:
    """Return rank 0's ``value``, which JSON can represent, on every rank."""
    if env.rank == 0:
        store.set(f"{name}/0", json.dumps(value))
    wait_for_ranks(store, name, [0], wait_s)
    return json.loads(store.get(f"{name}/0"))


def broadcast_findings(
    store: Store, env: DistributedEnvironment, name: str, findings: Sequence[Finding], wait_s: float
) -> list[Finding]:
    """Return rank 0's findings on every rank."""
    values = broadcast(store, env, name, [asdict(finding) for finding in findings], wait_s)
    return [Finding(**value) for value in values]


def wait_for_ranks(store: Store, name: str, ranks: Iterable[int], wait_s: float) -> None:
    """Wait until ``ranks`` have set their key ``NAME/RANK``. Raise RankError if some do not within ``wait_s``."""
    try:
        store.wait([f"{name}/{rank}" for rank in ranks], timedelta(seconds=wait_s))
    except dist.DistStoreError as error:
        missing = [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
        raise RankError(
            f"{format_ranks(missing)} did not answer within {wait_s:g} s (--wait); check their output"
        ) from error


def wait_for_all(store: Store, env: DistributedEnvironment, name: str, wait_s: float) -> None:
    """On rank 0, which may hold the store, wait until all ranks have arrived or ``wait_s`` has passed."""
    store.add(name, 1)
    deadline = time.monotonic() + wait_s
    while env.rank == 0 and store.add(name, 0) < env.world_size and time.monotonic() < deadline:
        time.sleep(0.02)
