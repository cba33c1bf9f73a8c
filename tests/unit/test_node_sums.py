"""Ranks are threads here: they share memory as processes do, and the C library waits without Python's lock."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction import shared_memory as node
from distlenet.reduction.barrier import Barrier, Peer
from distlenet.reduction.shared_memory import PIECE, NodeAllReduce, resolve_all_reduce

pytestmark = pytest.mark.unit

ENOUGH, FEW = frozenset(range(8)), frozenset({0})  # processors, with which a rank that waits looks or sleeps


def peer(pid: int, processors: frozenset[int] = ENOUGH) -> Peer:
    return replace(Peer.me(), pid=pid, processors=processors)


def all_reduces(ranks: int, processors: frozenset[int] = ENOUGH) -> list[NodeAllReduce]:
    memory = torch.zeros(NodeAllReduce.size(ranks), dtype=torch.uint8)
    Barrier.lay_out(memory, ranks)
    return [NodeAllReduce(memory, rank, [peer(os.getpid(), processors)] * ranks) for rank in range(ranks)]


def together(ranks: int, each) -> list:
    """Run ``each(rank)`` on all ranks at once, and return what they return."""
    with ThreadPoolExecutor(ranks) as pool:
        return [future.result(timeout=120) for future in [pool.submit(each, rank) for rank in range(ranks)]]


@pytest.mark.parametrize("processors", [ENOUGH, FEW])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "count", [1, 15, 16, 1000, PIECE // 2 + 3]
)  # the last are several pieces, of any dtype but one
def test_all_ranks_get_the_sum_in_the_order_of_ranks(ranks, dtype, count, processors):
    generator = torch.Generator().manual_seed(count)
    parts = [torch.randn(count, generator=generator).to(dtype) for _ in range(ranks)]
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted += part
    reduces = all_reduces(ranks, processors)

    def each(rank: int) -> torch.Tensor:
        for _ in range(3):  # what is left of one sum must not get into the next
            mine = parts[rank].clone()
            reduces[rank](mine)
        return mine

    for got in together(ranks, each):
        assert torch.equal(got, wanted)


def test_no_rank_takes_a_sum_before_it_is_whole_nor_after_it_is_gone():
    """Many sums in a row, each another: a rank that came through a barrier too early or late would have a wrong one."""
    ranks, rounds = 3, 2000
    reduces = all_reduces(ranks)

    def each(rank: int) -> int:
        wrong = 0
        for number in range(rounds):
            values = torch.full((100,), float(number * (rank + 1)))
            reduces[rank](values)
            wrong += int((values != number * 6).sum())
        return wrong

    assert together(ranks, each) == [0, 0, 0]


def test_nan_and_infinity_reach_all():
    reduces = all_reduces(2)

    def each(rank: int) -> torch.Tensor:
        values = torch.tensor([float("nan"), float("inf"), 1.0]) if rank == 0 else torch.ones(3)
        reduces[rank](values)
        return values

    for got in together(2, each):
        torch.testing.assert_close(got, torch.tensor([float("nan"), float("inf"), 2.0]), equal_nan=True)


@pytest.mark.parametrize("processors", [ENOUGH, FEW])
def test_a_rank_that_ends_is_not_waited_for(processors):
    ends = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    memory = torch.zeros(Barrier.size(2), dtype=torch.uint8)
    Barrier.lay_out(memory, 2)
    barrier = Barrier(memory, 0, [peer(os.getpid(), processors), peer(ends.pid, processors)])
    ends.communicate(b"\n", timeout=60)
    with pytest.raises(RuntimeError, match="rank 1: remote process exited"):
        barrier.wait()


def test_a_rank_that_came_and_then_ended_has_come(monkeypatch):
    """Also where it does both after the last look at the semaphore, and before that at the process."""
    ends = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    memory = torch.zeros(Barrier.size(2), dtype=torch.uint8)
    Barrier.lay_out(memory, 2)
    peers = [peer(os.getpid(), FEW), peer(ends.pid, FEW)]
    mine, its = Barrier(memory, 0, peers), Barrier(memory, 1, peers)
    ends.communicate(b"\n", timeout=60)
    its._take = lambda: None  # the one that ends does not wait
    slept = []
    monkeypatch.setattr(mine, "_sleep", lambda: slept.append(its.wait()))
    mine.wait()
    assert len(slept) == 1


def test_a_process_in_another_namespace_is_not_taken_for_the_one_that_has_its_number_here():
    with pytest.raises(OSError, match="different process namespaces"):
        replace(peer(os.getpid()), namespace=1).watch()


@pytest.mark.usefixtures("group")
def test_when_the_memory_is_not_shared(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    two_nodes = DistributedEnvironment(rank=0, world_size=2, local_world_size=1)
    assert resolve_all_reduce("off", DistributedEnvironment(), cpu) is dist.all_reduce
    assert resolve_all_reduce("auto", two_nodes, cpu) is dist.all_reduce
    assert resolve_all_reduce("auto", DistributedEnvironment(), gpu) is dist.all_reduce
    alone = torch.ones(3)
    resolve_all_reduce("auto", DistributedEnvironment(), cpu)(alone)
    assert alone.tolist() == [1, 1, 1]
    monkeypatch.setattr(node, "any_rank", lambda flag, _: not flag)  # another rank was told of two nodes
    assert resolve_all_reduce("auto", DistributedEnvironment(0, 0, 2, 2), cpu) is dist.all_reduce


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("lacks", ["memory", "pidfd_open"])
def test_what_cannot_be_had_is_told_and_gloo_adds(monkeypatch, capfd, lacks):
    def no(*_: object):
        raise OSError(38, f"no {lacks} here")

    monkeypatch.setattr(*((node, "_make_memory") if lacks == "memory" else (os, "pidfd_open")), no)
    monkeypatch.setattr(dist, "all_gather_object", lambda everyones, mine: everyones.__setitem__(0, mine))
    assert resolve_all_reduce("auto", DistributedEnvironment(0, 0, 2, 2), torch.device("cpu")) is dist.all_reduce
    told = capfd.readouterr().err
    assert f"rank 0 cannot share memory ([Errno 38] no {lacks} here), so Gloo adds the gradients" in told
    assert "give distributed.shared_memory=off" in told
