"""Ranks are threads here: they share memory as processes do, and the C library waits without Python's lock."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from distlenet.reduction import node
from distlenet.reduction.barrier import Barrier, Peer
from distlenet.reduction.node import PIECE, NodeAllReduce, pick_all_reduce
from distlenet.world import World

pytestmark = pytest.mark.unit

ENOUGH, FEW = frozenset(range(8)), frozenset({0})  # processors, with which a rank that waits looks or sleeps


def all_reduces(ranks: int, processors: frozenset[int] = ENOUGH) -> list[NodeAllReduce]:
    memory = torch.zeros(NodeAllReduce.size(ranks), dtype=torch.uint8)
    Barrier.lay_out(memory, ranks)
    return [NodeAllReduce(memory, rank, [Peer(os.getpid(), processors)] * ranks) for rank in range(ranks)]


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
def test_a_rank_that_has_ended_is_not_waited_for(processors):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    memory = torch.zeros(Barrier.size(2), dtype=torch.uint8)
    Barrier.lay_out(memory, 2)
    barrier = Barrier(memory, 0, [Peer(os.getpid(), processors), Peer(ended.pid, processors)])
    with pytest.raises(RuntimeError, match="local rank 1: remote process exited"):
        barrier.wait()


def test_a_rank_that_came_and_then_ended_has_come(monkeypatch):
    """Also where it does both after the last look at the semaphore, and before that at the process."""
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, but still in the table of processes
    memory = torch.zeros(Barrier.size(2), dtype=torch.uint8)
    Barrier.lay_out(memory, 2)
    peers = [Peer(os.getpid(), FEW), Peer(zombie.pid, FEW)]
    assert peers[1].gone()
    assert not peers[0].gone()
    mine, its = Barrier(memory, 0, peers), Barrier(memory, 1, peers)
    its._take = lambda: None  # the one that ends does not wait
    monkeypatch.setattr(mine, "_sleep", lambda: its.wait())
    mine.wait()
    zombie.wait()


@pytest.mark.usefixtures("group")
def test_when_the_memory_is_not_shared():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    two_nodes = World(rank=0, world_size=2, local_world_size=1)
    assert pick_all_reduce("off", World(), cpu) is dist.all_reduce
    assert pick_all_reduce("auto", two_nodes, cpu) is dist.all_reduce
    assert pick_all_reduce("auto", World(), gpu) is dist.all_reduce
    alone = torch.ones(3)
    pick_all_reduce("auto", World(), cpu)(alone)
    assert alone.tolist() == [1, 1, 1]


@pytest.mark.usefixtures("group")
def test_memory_that_cannot_be_had_is_told_and_gloo_adds(monkeypatch, capfd):
    def no_memory(_: int):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(node, "_make_memory", no_memory)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: None)
    assert pick_all_reduce("auto", World(0, 0, 2, 2), torch.device("cpu")) is dist.all_reduce
    assert "ranks cannot share memory here ([Errno 12] Cannot allocate memory)" in capfd.readouterr().err
