import pytest
import torch

from distlenet import distributed
from distlenet.distributed import pick_backend, pick_device, ranks_in_words
from distlenet.errors import UserError
from distlenet.world import World

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("wanted", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 3, "cpu"), ("cpu", 8, "cpu"), ("auto", 4, "cuda:1"), ("cuda", 8, "cuda:1")],
)
def test_device(wanted, gpus, device):
    assert pick_device(wanted, World(5, 1, 8, 4, 1), gpus) == torch.device(device)


@pytest.mark.parametrize(("wanted", "gpus"), [("cuda", 0), ("cuda", 3)])
def test_a_device_that_would_be_shared_or_is_missing_is_refused(wanted, gpus):
    with pytest.raises(UserError, match="device=cpu"):
        pick_device(wanted, World(5, 1, 8, 4, 1), gpus)


def test_backend(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: True)
    assert pick_backend("auto", cpu) == "gloo"
    assert pick_backend("auto", gpu) == "nccl"
    assert pick_backend("gloo", gpu) == "gloo"
    assert pick_backend("nccl", gpu) == "nccl"
    with pytest.raises(UserError, match="backend=nccl"):
        pick_backend("nccl", cpu)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    assert pick_backend("auto", gpu) == "gloo"
    with pytest.raises(UserError, match="backend=nccl"):
        pick_backend("nccl", gpu)


def test_ranks_in_words():
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([3, 5]) == "ranks 3, 5"
    assert ranks_in_words(range(20), most=2) == "ranks 0, 1 and 18 more"
