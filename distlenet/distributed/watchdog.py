"""The watchdog: it ends a rank that hangs, and names the ranks that do not respond.

A collective waits forever for a rank that has stopped, and does not report which one it is. A thread of each rank
therefore writes a note to the job's store if no step ends in time, and reads the notes of the others.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import call_with_timeout, format_ranks, host_of
from distlenet.utils.errors import warn

HUNG = 1  # exit status
SUSPENDED_S = 30.0  # a process that checks this late was suspended (scontrol suspend)


_running: list["Watchdog"] = []


def restart_time_limit() -> None:
    """Restart the time limit of this process's watchdog, if it has one: work outside of the steps has progressed."""
    for watchdog in _running:
        watchdog.heartbeat(watchdog.step)


class Watchdog:
    """End this process if ``heartbeat`` is not called for ``limit_s`` seconds; NCCL's trace goes to ``trace_dir``.

    The time of the last change of ``heartbeat_file`` is that of the last call, to within a second.
    """

    def __init__(
        self,
        store: Store,
        env: DistributedEnvironment,
        limit_s: float,
        trace_dir: Path | None,
        heartbeat_file: Path | None,
    ) -> None:
        # A separate connection: the main thread may be waiting on the first.
        self.store = store.clone() if env.master_addr else store
        self.env, self.trace_dir, self.heartbeat_file = env, trace_dir, heartbeat_file
        self.master_host = host_of(self.store, 0)  # read now: later the store may not respond
        self.ended = threading.Event()
        self.limit_s, self.setting = limit_s, "distributed.init_timeout_s"
        self.step, self.last_heartbeat, self.last_touch = 0, time.monotonic(), 0.0

    def set_timeout(self, limit_s: float, setting: str) -> None:
        """Set another time limit, the value of ``setting``."""
        self.last_heartbeat = time.monotonic()  # first, since the thread may check between the two
        self.limit_s, self.setting = limit_s, setting

    def heartbeat(self, step: int) -> None:
        """Record that ``step`` steps have ended."""
        self.step, self.last_heartbeat = step, time.monotonic()

    def watch(self) -> None:
        """Check the time until ``ended`` is set; after the limit, report and end the process."""
        last_check = time.monotonic()
        while not self.ended.wait(min(1.0, self.limit_s / 10)):
            self.touch_file()
            now = time.monotonic()
            if now - last_check > SUSPENDED_S:
                self.last_heartbeat += now - last_check
            last_check = now
            if time.monotonic() - self.last_heartbeat > self.limit_s:
                try:
                    self.report()
                finally:
                    os._exit(HUNG)  # without cleanup: the main thread is blocked

    def touch_file(self) -> None:
        """Touch the heartbeat file if there was a heartbeat since the last time."""
        last_heartbeat = self.last_heartbeat
        if self.heartbeat_file is not None and last_heartbeat > self.last_touch:
            self.last_touch = last_heartbeat
            with contextlib.suppress(OSError):  # the probe that reads it then reports it
                self.heartbeat_file.touch()

    def report(self) -> None:
        """Print, on one rank, which ranks do not respond."""
        text = f"no step ended for {self.limit_s:g} s ({self.setting}) after step {self.step};"
        if self.trace_dir is not None:
            text += f" NCCL's flight recorder is in {self.trace_dir}, for torchfrtrace; it does not contain collectives"
            text += " that a CUDA graph replays (set train.cuda_graph=off to record them);"
        wait_s = min(max(0.1 * self.limit_s, 1.0), 10.0)
        try:  # with a timeout, since a store whose process is stopped never answers
            finding = call_with_timeout(lambda: self.collect_notes(wait_s), 4 * wait_s)
        except (TimeoutError, RuntimeError):
            server = "torchrun's agent" if self.env.agent_store else f"rank 0 on {self.master_host}"
            finding = f"{server} does not respond to {self.env}; check that it is running"
        if finding:
            warn(f"{text} {finding}")

    def collect_notes(self, wait_s: float) -> str | None:
        """Write this rank's note, wait ``wait_s`` for the notes of the others, and return what they show.

        Only the lowest rank with a note returns it; the others return None. Raise DistError if the store fails.
        """
        if self.trace_dir is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self.trace_dir.mkdir(parents=True, exist_ok=True)
                trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                (self.trace_dir / f"rank_{self.env.rank}").write_bytes(trace)  # the file name that torchfrtrace expects
        self.store.set_timeout(timedelta(seconds=wait_s))
        self.store.set(f"late/{self.env.rank}", json.dumps([self.step, socket.gethostname()]))
        time.sleep(wait_s)
        if any(self.store.check([f"late/{rank}"]) for rank in range(self.env.rank)):
            time.sleep(wait_s)  # let the lowest rank report first: a rank that exits may end all
            return None
        ranks = range(self.env.world_size)
        missing = [rank for rank in ranks if not self.store.check([f"late/{rank}"])]
        if missing:
            return f"no answer from {_format_hosts({rank: host_of(self.store, rank) for rank in missing})}"
        notes = {rank: json.loads(self.store.get(f"late/{rank}")) for rank in ranks}
        last_step = min(step for step, _ in notes.values())
        slow = {rank: host for rank, (step, host) in notes.items() if step == last_step}
        if len(slow) == len(notes):
            return "all ranks answer and are at the same step; check the network between them"
        return f"all ranks answer, but {_format_hosts(slow)} ended only step {last_step}"


@contextmanager
def run_watchdog(
    store: Store,
    env: DistributedEnvironment,
    limit_s: float,
    trace_dir: Path | None,
    heartbeat_file: Path | None,
) -> Iterator[Watchdog]:
    """Yield a Watchdog whose thread runs until the end of the block, which removes ``heartbeat_file``."""
    watchdog = Watchdog(store, env, limit_s, trace_dir, heartbeat_file)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    thread.start()
    _running.append(watchdog)
    try:
        yield watchdog
    finally:
        _running.remove(watchdog)
        watchdog.ended.set()
        thread.join(timeout=1.0)
        if heartbeat_file is not None:
            with contextlib.suppress(OSError):
                heartbeat_file.unlink(missing_ok=True)


def _format_hosts(hosts: dict[int, str]) -> str:
    by_host = {host: [rank for rank in hosts if hosts[rank] == host] for host in hosts.values()}
    return ", ".join(f"{format_ranks(ranks)} on {host}" for host, ranks in by_host.items())
