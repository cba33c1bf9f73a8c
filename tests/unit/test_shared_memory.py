"""Ranks are threads here: they share memory as processes do, and ctypes releases Python's lock while they wait."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import LIMIT_S

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction import shared_memory
from distlenet.reduction.barrier import Barrier, Peer
from distlenet.reduction.shared_memory import CHUNK_BYTES, SharedMemoryAllReduce, resolve_all_reduce

pytestmark = pytest.mark.unit

MANY_CPUS, ONE_CPU = frozenset(range(8)), frozenset({0})  # a waiting rank polls with many CPUs, and sleeps with one


def make_peer(pid: int, cpus: frozenset[int] = MANY_CPUS) -> Peer:
    return replace(Peer.current(), pid=pid, cpus=cpus)


def make_all_reduces(ranks: int, cpus: frozenset[int] = MANY_CPUS) -> list[SharedMemoryAllReduce]:
    memory = torch.zeros(SharedMemoryAllReduce.required_bytes(ranks), dtype=torch.uint8)
    Barrier.init_semaphores(memory, ranks)
    return [SharedMemoryAllReduce(memory, rank, [make_peer(os.getpid(), cpus)] * ranks) for rank in range(ranks)]


def run_on_all_ranks(ranks: int, function) -> list:
    """Run ``function(rank)`` on all ranks at once, and return the results."""
    with ThreadPoolExecutor(ranks) as pool:
        return [future.result(timeout=LIMIT_S) for future in [pool.submit(function, rank) for rank in range(ranks)]]


@pytest.mark.parametrize("cpus", [MANY_CPUS, ONE_CPU])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 15, 16, 1000, CHUNK_BYTES // 2 + 3])  # the last needs several chunks
def test_all_ranks_get_the_sum_in_rank_order(ranks, dtype, count, cpus):
    generator = torch.Generator().manual_seed(count)
    inputs = [torch.randn(count, generator=generator).to(dtype) for _ in range(ranks)]
    expected = inputs[0].clone()
    for values in inputs[1:]:
        expected += values
    all_reduces = make_all_reduces(ranks, cpus)

    def run(rank: int) -> torch.Tensor:
        for _ in range(3):  # no sum must depend on the previous one
            values = inputs[rank].clone()
            all_reduces[rank](values)
        return values

    for result in run_on_all_ranks(ranks, run):
        assert torch.equal(result, expected)


def test_no_rank_reads_a_sum_too_early_or_too_late():
    """Many different sums in a row: a rank that passed a barrier too early or too late would get a wrong one."""
    ranks, rounds = 3, 2000
    all_reduces = make_all_reduces(ranks)

    def count_wrong(rank: int) -> int:
        wrong = 0
        for number in range(rounds):
            values = torch.full((100,), float(number * (rank + 1)))
            all_reduces[rank](values)
            wrong += int((values != number * 6).sum())
        return wrong

    assert run_on_all_ranks(ranks, count_wrong) == [0, 0, 0]


def test_nan_and_infinity_reach_all_ranks():
    all_reduces = make_all_reduces(2)

    def run(rank: int) -> torch.Tensor:
        values = torch.tensor([float("nan"), float("inf"), 1.0]) if rank == 0 else torch.ones(3)
        all_reduces[rank](values)
        return values

    for result in run_on_all_ranks(2, run):
        torch.testing.assert_close(result, torch.tensor([float("nan"), float("inf"), 2.0]), equal_nan=True)


def start_short_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


@pytest.mark.parametrize("cpus", [MANY_CPUS, ONE_CPU])
def test_wait_fails_if_a_rank_has_exited(cpus):
    process = start_short_process()
    memory = torch.zeros(Barrier.required_bytes(2), dtype=torch.uint8)
    Barrier.init_semaphores(memory, 2)
    barrier = Barrier(memory, 0, [make_peer(os.getpid(), cpus), make_peer(process.pid, cpus)])
    process.communicate(b"\n", timeout=LIMIT_S)
    with pytest.raises(RuntimeError, match="rank 1: remote process exited"):
        barrier.wait()


def test_rank_that_arrived_and_then_exited_has_arrived(monkeypatch):
    """Also if both happen between the last poll of the semaphore and the check whether the process is alive."""
    process = start_short_process()
    memory = torch.zeros(Barrier.required_bytes(2), dtype=torch.uint8)
    Barrier.init_semaphores(memory, 2)
    peers = [make_peer(os.getpid(), ONE_CPU), make_peer(process.pid, ONE_CPU)]
    waiting, exiting = Barrier(memory, 0, peers), Barrier(memory, 1, peers)
    process.communicate(b"\n", timeout=LIMIT_S)
    exiting._acquire = lambda: None  # the exiting rank posts without waiting
    sleeps = []
    monkeypatch.setattr(waiting, "_sleep", lambda: sleeps.append(exiting.wait()))
    waiting.wait()
    assert len(sleeps) == 1


def test_process_in_another_namespace_is_not_mistaken_for_a_peer():
    with pytest.raises(OSError, match="different process namespaces"):
        replace(make_peer(os.getpid()), namespace=1).open_pidfd()


@pytest.mark.usefixtures("group")
def test_memory_is_shared_only_on_the_cpus_of_one_machine(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    two_nodes = DistributedEnvironment(rank=0, world_size=2, local_world_size=1)
    assert resolve_all_reduce("off", DistributedEnvironment(), cpu) is dist.all_reduce
    assert resolve_all_reduce("auto", two_nodes, cpu) is dist.all_reduce
    assert resolve_all_reduce("auto", DistributedEnvironment(), gpu) is dist.all_reduce
    values = torch.ones(3)
    resolve_all_reduce("auto", DistributedEnvironment(), cpu)(values)
    assert values.tolist() == [1, 1, 1]
    monkeypatch.setattr(shared_memory, "any_rank", lambda flag, _: not flag)  # another rank knows of two nodes
    assert resolve_all_reduce("auto", DistributedEnvironment(0, 0, 2, 2), cpu) is dist.all_reduce


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("missing", ["memory", "pidfd_open"])
def test_gloo_sums_with_a_warning_if_memory_cannot_be_shared(monkeypatch, capfd, missing):
    def fail(*_: object):
        raise OSError(38, f"no {missing} here")

    monkeypatch.setattr(*((shared_memory, "_create_memory") if missing == "memory" else (os, "pidfd_open")), fail)
    assert resolve_all_reduce("auto", DistributedEnvironment(0, 0, 2, 2), torch.device("cpu")) is dist.all_reduce
    warning = capfd.readouterr().err
    assert f"rank 0 cannot share memory ([Errno 38] no {missing} here), so Gloo sums the gradients" in warning
    assert "give distributed.shared_memory=off" in warning
