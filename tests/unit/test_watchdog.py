"""The watchdog reports a hang, and ends the process."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist
from conftest import LIMIT_S, run_command

from distlenet.distributed.context import prepare_heartbeat_file
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import host_key
from distlenet.distributed.watchdog import Watchdog, restart_time_limit, run_watchdog
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def watchdogs(ranks: int) -> list[Watchdog]:
    """Return the watchdogs of ranks with one store, two ranks per host."""
    store = dist.HashStore()
    for rank in range(ranks):
        store.set(host_key(rank), f"nonce host{rank // 2}")
    return [Watchdog(store, DistributedEnvironment(rank, 0, ranks), 1.0, None, None) for rank in range(ranks)]


def collect(late: list[Watchdog]) -> list[str | None]:
    """Return what ranks report that collect notes at the same time: each waits until all have written theirs."""
    all_written, written = threading.Barrier(len(late)), set()

    def wait(_: float) -> None:
        if (thread := threading.get_ident()) not in written:
            written.add(thread)
            all_written.wait(LIMIT_S)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=wait)
    with mock.patch("distlenet.distributed.watchdog.time", clock), ThreadPoolExecutor(len(late)) as pool:
        return list(pool.map(lambda watchdog: watchdog.collect_notes(60.0), late))


def test_ranks_without_a_note_are_reported_once_with_their_hosts():
    ranks = watchdogs(5)
    assert collect([ranks[1], ranks[4]]) == ["no answer from rank 0 on host0, ranks 2, 3 on host1", None]


def test_a_rank_at_an_earlier_step_is_reported():
    ranks = watchdogs(2)
    ranks[0].heartbeat(40)
    ranks[1].heartbeat(39)
    report, silent = collect(ranks)
    assert report.startswith("all ranks answer, but rank 1 on ")
    assert report.endswith("ended only step 39")
    assert silent is None


def test_all_ranks_at_the_same_step():
    assert "check the network" in collect(watchdogs(2))[0]


def test_the_flight_recorder_is_reported_with_its_limit(tmp_path, monkeypatch, capsys):
    """A replayed CUDA graph launches its collectives without NCCL's process group, which records them."""
    monkeypatch.setattr("torch._C._distributed_c10d._dump_nccl_trace", lambda: b"trace", raising=False)
    store = dist.HashStore()
    store.set(host_key(0), "nonce host0")
    Watchdog(store, DistributedEnvironment(), 1.0, tmp_path, None).report()
    assert (tmp_path / "rank_0").read_bytes() == b"trace"
    line = capsys.readouterr().err
    assert f"NCCL's flight recorder is in {tmp_path}, for torchfrtrace; it does not contain collectives that" in line
    assert "train.cuda_graph=off" in line


HANGS = """
import threading, time
from types import SimpleNamespace
import torch.distributed as dist
from distlenet.distributed import watchdog as module
from distlenet.distributed.environment import DistributedEnvironment

now, reads = 0.0, 0

def monotonic():
    global reads
    reads += threading.current_thread().name == "watchdog"
    return now

def advance(seconds):
    # Wait until the thread has checked the new time: a check reads the clock twice.
    global now
    now += seconds
    target = reads + 4
    while reads < target:
        time.sleep(0.001)

module.time = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
store = dist.HashStore()
store.set("host/0", "nonce host0")
with module.run_watchdog(store, DistributedEnvironment(1, 0, 2), 60, None, None) as watchdog:
    watchdog.set_timeout(0.5, "distributed.step_timeout_s")
    for step in range(10):
        advance(0.4)
        watchdog.heartbeat(step)
    print("trained", flush=True)
    advance(0.6)
    print("not ended")
"""


@pytest.mark.slow
def test_the_process_ends_if_no_step_ends_and_not_before():
    ended = run_command(sys.executable, "-c", HANGS)
    assert (ended.status, ended.stdout) == (1, "trained\n"), str(ended)
    limit = "no step ended for 0.5 s (distributed.step_timeout_s) after step 9"
    assert ended.stderr == f"distlenet: {limit}; no answer from rank 0 on host0\n"


def test_the_heartbeat_file_is_touched_only_after_a_heartbeat(tmp_path):
    path, store = tmp_path / "heartbeat", dist.HashStore()
    store.set(host_key(0), "nonce host0")
    watchdog = Watchdog(store, DistributedEnvironment(), 60.0, None, path)
    watchdog.touch_file()  # the start
    os.utime(path, times=(0, 0))
    watchdog.touch_file()  # no step has ended
    assert path.stat().st_mtime == 0
    watchdog.heartbeat(1)
    watchdog.touch_file()
    assert path.stat().st_mtime > 0


@pytest.mark.slow
def test_the_heartbeat_file_exists_until_the_end(tmp_path):
    path, store = tmp_path / "heartbeat", dist.HashStore()
    store.set(host_key(0), "nonce host0")
    with run_watchdog(store, DistributedEnvironment(), 60.0, None, path):
        deadline = time.monotonic() + LIMIT_S  # the thread checks once a second
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.exists()
    assert not path.exists()


def test_a_heartbeat_file_that_cannot_be_written_is_an_error(tmp_path):
    path = tmp_path / "missing/heartbeat"
    with pytest.raises(UserError, match=f"heartbeat_file={path}: cannot be written; give a file in a writable dir"):
        prepare_heartbeat_file(str(path))


def test_the_heartbeat_file_of_an_earlier_job_is_removed_and_nothing_else(tmp_path):
    earlier, notes, link = tmp_path / "heartbeat", tmp_path / "notes", tmp_path / "link"
    earlier.touch()
    notes.write_text("mine")
    link.symlink_to(earlier)
    for path in (tmp_path, notes, link):
        with pytest.raises(UserError, match=f"heartbeat_file={path}: exists and is not an empty file; give another"):
            prepare_heartbeat_file(str(path))
        assert path.exists()
    assert prepare_heartbeat_file(str(earlier)) == earlier
    assert not earlier.exists()


def test_progress_outside_of_steps_restarts_the_time_limit():
    restart_time_limit()  # without a watchdog
    env, store = DistributedEnvironment(), dist.HashStore()
    store.set(host_key(0), "nonce host0")
    with run_watchdog(store, env, 60.0, None, None) as watchdog:
        watchdog.heartbeat(3)
        watchdog.last_heartbeat -= 50
        restart_time_limit()
        assert (watchdog.step, time.monotonic() - watchdog.last_heartbeat < 40) == (3, True)
