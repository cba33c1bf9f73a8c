"""What ends a job that hangs, and says who does not answer.

A collective waits for the slowest rank, for ever where that one has stopped; the ranks that wait know only that
they wait. So each rank watches itself in a thread: when no step ends for too long, it leaves a note in the job's
store, and looks whose notes are missing there.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import format_ranks, host_of
from distlenet.utils.errors import warn

ASK_SHARE = 0.1  # of the timeout is how long the others may take to notice it too,
ASK_LEAST_S, ASK_MOST_S = 1.0, 10.0  # within these bounds
HUNG = 1  # exit status
SUSPENDED_S = 30.0  # between two looks: no running process is that late


class Watchdog:
    """Ends this process where ``heartbeat`` is not called for ``limit_s`` seconds."""

    def __init__(self, store: Store, env: DistributedEnvironment, limit_s: float, trace: Path | None) -> None:
        """Watch from now on; ``trace`` is the folder for what NCCL recorded, None without NCCL."""
        # A connection of its own, where torch is new enough for that: the first may be waiting.
        self.store = store.clone() if env.init_method and hasattr(store, "clone") else store
        self.env, self.trace = env, trace
        self.first_host = host_of(self.store, 0)  # now: later rank 0 may be what is missing
        self.ended = threading.Event()
        self.limit_s, self.setting = limit_s, "distributed.init_timeout_s"
        self.step, self.last = 0, time.monotonic()
        self.end: Callable[[int], Any] = os._exit  # no cleaning up: the main thread is stuck

    def set_timeout(self, limit_s: float, setting: str) -> None:
        """Go over to another limit, the value of ``setting``."""
        self.last = time.monotonic()  # first: the thread may look in between
        self.limit_s, self.setting = limit_s, setting

    def heartbeat(self, step: int) -> None:
        """Say that all is well, after ``step`` steps. Costs nothing."""
        self.step, self.last = step, time.monotonic()

    def watch(self) -> None:
        """Look until ``ended``."""
        looked = time.monotonic()
        while not self.ended.wait(min(1.0, self.limit_s / 10)):
            now = time.monotonic()
            if (slept := now - looked) > SUSPENDED_S:  # the whole process was stopped, as by scontrol suspend
                self.last += slept
            looked = now
            if time.monotonic() - self.last > self.limit_s:
                try:
                    self.report()
                finally:
                    self.end(HUNG)
                return

    def report(self) -> None:
        """Say, on one rank, who does not answer."""
        what = f"no step ended for {self.limit_s:g} s ({self.setting}) after step {self.step};"
        if self.trace is not None:
            what = f"{what} what NCCL did is in {self.trace}, for torchfrtrace;"
        wait_s = min(max(self.limit_s * ASK_SHARE, ASK_LEAST_S), ASK_MOST_S)
        findings: list[str | None] = []
        # In a thread: a store whose process is stopped keeps the connection, and whoever reads from it, for ever.
        asking = threading.Thread(target=lambda: findings.append(self.collect_notes(wait_s)), daemon=True)
        asking.start()
        asking.join(4 * wait_s)
        if not findings:
            where = "torchrun's agent" if self.env.init_method == "env://" else f"rank 0 on {self.first_host}"
            warn(
                f"{what} {where} does not answer (says rank {self.env.rank} on {socket.gethostname()}); look "
                "whether it runs"
            )
        elif findings[0]:
            warn(f"{what} {findings[0]}")

    def collect_notes(self, wait_s: float) -> str | None:
        """Ask all ranks through the store, and give them ``wait_s`` to notice, too.

        Returns what is wrong, on the lowest rank that answers alone. Raises DistError without the store.
        """
        if self.trace is not None:
            with contextlib.suppress(OSError, RuntimeError):
                dump_flight_recorder(self.trace, self.env.rank)
        self.store.set_timeout(timedelta(seconds=wait_s))
        self.store.set(_key(self.env.rank), json.dumps([self.step, socket.gethostname()]))
        time.sleep(wait_s)
        if any(self._note(rank) for rank in range(self.env.rank)):
            time.sleep(wait_s)  # that one speaks for all; and the first to end may end all
            return None
        notes = {rank: note for rank in range(self.env.world_size) if (note := self._note(rank))}
        missing = [rank for rank in range(self.env.world_size) if rank not in notes]
        if missing:
            return f"no answer from {_with_hosts({rank: host_of(self.store, rank) for rank in missing})}"
        behind = min(step for step, _ in notes.values())
        slow = {rank: host for rank, (step, host) in notes.items() if step == behind}
        if len(slow) == len(notes):
            return "all ranks answer and are at the same step: look at the network between them"
        return f"all ranks answer, but {_with_hosts(slow)} ended only step {behind}"

    def _note(self, rank: int) -> tuple[int, str] | None:
        if not self.store.check([_key(rank)]):
            return None
        step, host = json.loads(self.store.get(_key(rank)))
        return step, host


@contextmanager
def run_watchdog(store: Store, env: DistributedEnvironment, limit_s: float, trace: Path | None) -> Iterator[Watchdog]:
    """Have a watchdog for the length of a ``with`` block."""
    watchdog = Watchdog(store, env, limit_s, trace)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.ended.set()
        thread.join(timeout=1.0)


def dump_flight_recorder(folder: Path, rank: int) -> None:
    """Write NCCL's last collectives as this rank saw them, under the name that torchfrtrace looks for.

    Source: https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank_{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


def _key(rank: int) -> str:
    return f"late/{rank}"


def _with_hosts(ranks: dict[int, str]) -> str:
    by_host: dict[str, list[int]] = {}
    for rank, host in ranks.items():
        by_host.setdefault(host, []).append(rank)
    return ", ".join(f"{format_ranks(of_host)} on {host}" for host, of_host in by_host.items())
