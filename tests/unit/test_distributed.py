import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed import collectives as distributed
from distlenet.distributed.device import resolve_backend, resolve_device
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import format_ranks, meet
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("wanted", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 3, "cpu"), ("cpu", 8, "cpu"), ("auto", 4, "cuda:1"), ("cuda", 8, "cuda:1")],
)
def test_device(wanted, gpus, device):
    assert resolve_device(wanted, DistributedEnvironment(5, 1, 8, 4, 1), gpus) == torch.device(device)


@pytest.mark.parametrize(("wanted", "gpus"), [("cuda", 0), ("cuda", 3)])
def test_a_device_that_would_be_shared_or_is_missing_is_refused(wanted, gpus):
    with pytest.raises(UserError, match="device=cpu"):
        resolve_device(wanted, DistributedEnvironment(5, 1, 8, 4, 1), gpus)


def test_backend(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: True)
    assert resolve_backend("auto", cpu) == "gloo"
    assert resolve_backend("auto", gpu) == "nccl"
    assert resolve_backend("gloo", gpu) == "gloo"
    assert resolve_backend("nccl", gpu) == "nccl"
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", cpu)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    assert resolve_backend("auto", gpu) == "gloo"
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", gpu)


def test_ranks_in_words():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([3, 5]) == "ranks 3, 5"
    assert format_ranks(range(20), most=2) == "ranks 0, 1 and 18 more"


def gather(store, world_size, timeout_s=20.0, ranks=None):
    """Have ranks meet, each in a thread; return what each found, or its error."""
    found = {}

    def come(rank):
        try:
            found[rank] = meet(
                store,
                DistributedEnvironment(rank, 0, world_size),
                timedelta(seconds=timeout_s),
                "distributed.init_timeout_s",
            )
        except UserError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks or range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_meet_again_and_again_in_one_store_and_never_with_the_dead():
    store = dist.HashStore()
    for attempt, world_size in enumerate((3, 3, 2, 4, 1, 3)):
        # Another order each time: rank 0 first, last and in between, while the entries of the dead are still there.
        order = [(rank + attempt) % world_size for rank in range(world_size)]
        here = gather(store, world_size, ranks=order)
        for rank in range(world_size):
            here[rank].set(f"address/{rank}", f"{attempt}")
        for rank in range(world_size):
            for other in range(world_size):
                assert here[rank].get(f"address/{other}") == f"{attempt}".encode()


def test_who_does_not_come_is_named():
    (told,) = gather(dist.HashStore(), 3, timeout_s=0.2, ranks=[0]).values()
    assert "rank 0 of 3" in told
    assert "ranks 1, 2 did not come in time (distributed.init_timeout_s)" in told
    (told,) = gather(dist.HashStore(), 3, timeout_s=0.2, ranks=[2]).values()
    assert "rank 0 did not come in time" in told


def test_who_died_half_way_through_meeting_is_not_taken_for_one_that_is_here():
    store = dist.HashStore()
    gather(store, 2, timeout_s=0.2, ranks=[0])  # a start that failed: its name stays
    here = gather(store, 2)
    here[1].set("x", "new")
    assert here[0].get("x") == b"new"
