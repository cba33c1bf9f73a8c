"""The checks that run before there is a process group: ranks exchange their results through the job's store."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from tempfile import NamedTemporaryFile
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.config.loading import runs_directory
from distlenet.config.schema import Config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import format_ranks
from distlenet.distributed.visible_gpus import agree_on_device, visible_gpus
from distlenet.preflight.finding import Finding
from distlenet.preflight.node_checks import NodeReport, apply_node_rules, check_node, check_object_store
from distlenet.preflight.ports import publish_listener
from distlenet.preflight.rank_info import RankInfo, collect_rank_info
from distlenet.preflight.rules import apply_rules
from distlenet.utils.errors import RankError
from distlenet.utils.urls import is_url


class Exchange:
    """JSON values that the ranks exchange through a store; ``patience`` is a multiple of ``wait_s`` seconds."""

    def __init__(self, store: Store, env: DistributedEnvironment, wait_s: float):
        self.store, self.env, self.wait_s = store, env, wait_s

    def gather(self, name: str, value: object, patience: float = 1) -> list[Any]:
        """Return every rank's ``value`` on rank 0, and [] on the others. Raise RankError if a rank is late."""
        self.store.set(f"{name}/{self.env.rank}", json.dumps(value))
        return self._read(name, range(self.env.world_size), patience) if self.env.rank == 0 else []

    def broadcast(self, name: str, value: object, patience: float = 1) -> Any:
        """Return rank 0's ``value`` on every rank. Raise RankError if rank 0 is late."""
        if self.env.rank == 0:
            self.store.set(f"{name}/0", json.dumps(value))
        return self._read(name, [0], patience)[0]

    def _read(self, name: str, ranks: Sequence[int], patience: float) -> list[Any]:
        keys = [f"{name}/{rank}" for rank in ranks]
        try:
            self.store.wait(keys, timedelta(seconds=patience * self.wait_s))
        except dist.DistStoreError as error:
            missing = format_ranks([rank for rank, key in zip(ranks, keys, strict=True) if not self.store.check([key])])
            waited = f"{patience * self.wait_s:g} s (--wait)"
            raise RankError(f"{missing} did not answer within {waited}; check their output") from error
        return [json.loads(value) for value in self.store.multi_get(keys)]


def run_node_checks(config: Config, exchange: Exchange) -> list[Finding]:
    """Check every rank, and the ports, disks and data of every node, on the first rank of each.

    Return rank 0's findings on every rank. Raise RankError if a rank does not answer.
    """
    env, store = exchange.env, exchange.store
    gpus = visible_gpus(config.device)
    info = collect_rank_info(config, env, agree_on_device(config.device, gpus, env, store, exchange.wait_s, "--wait"))
    address = ("" if info.is_loopback else info.address) or info.route_address or "127.0.0.1"
    listener = publish_listener(store, env.node_rank, address) if env.local_rank == 0 else None
    # Every node keeps its listener, and rank 0 its token, until all nodes have reported.
    with listener or contextlib.nullcontext(), contextlib.ExitStack() as stack:
        infos = [RankInfo(**value) for value in exchange.gather("info", asdict(info))]
        token, num_nodes = "", infos[-1].node_rank + 1 if infos else 0
        if env.rank == 0:
            with contextlib.suppress(OSError):  # reported by check_run_dir
                os.makedirs(runs_directory(config), exist_ok=True)
                file = stack.enter_context(NamedTemporaryFile(prefix=".preflight-", dir=runs_directory(config)))
                token = os.path.basename(file.name)
        before = time.time()
        token, num_nodes = exchange.broadcast("start", [token, num_nodes], 2)
        clocks = exchange.gather("clock", time.time())  # at the same time on all ranks, unless a node is busy
        clocks = [clock_offset(clock, before, time.time()) for clock in clocks]
        report = asdict(check_node(config, info, num_nodes, store, token)) if env.local_rank == 0 else None
        nodes = [NodeReport(**value) for value in exchange.gather("node", report, 3) if value]
        findings = apply_rules(infos, clocks, config) + apply_node_rules(nodes, config) if env.rank == 0 else []
        if env.rank == 0 and is_url(config.run.dir):
            findings.append(check_object_store(config.run.dir))
        return [Finding(*value) for value in exchange.broadcast("node findings", findings, 5)]


def clock_offset(clock: float, before: float, after: float) -> float:
    """Return by how many seconds a clock is certainly ahead of this one (behind: below 0).

    It was read between the times ``before`` and ``after`` of this one, perhaps seconds after the others.
    """
    return clock - min(max(clock, before), after)
