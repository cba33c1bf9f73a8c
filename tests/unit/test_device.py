"""The device and the backend of a rank."""

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed.device import resolve_backend, resolve_device
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

ENV = DistributedEnvironment(rank=5, local_rank=1, world_size=8, local_world_size=4, node_rank=1)


@pytest.mark.parametrize(
    ("wanted", "gpus", "device"),
    [("auto", 0, "cpu"), ("auto", 3, "cpu"), ("cpu", 8, "cpu"), ("auto", 4, "cuda:1"), ("cuda", 8, "cuda:1")],
)
def test_device(wanted, gpus, device):
    assert resolve_device(wanted, ENV, gpus) == torch.device(device)


def test_device_of_a_task_that_sees_only_its_own_gpu():
    env = DistributedEnvironment(rank=5, local_rank=3, world_size=8, local_world_size=4, node_rank=1, own_gpu=True)
    assert resolve_device("auto", env, 1) == torch.device("cuda", 0)
    assert resolve_device("auto", env, 4) == torch.device("cuda", 3)  # GPUs are not bound to tasks: all are visible


@pytest.mark.parametrize("gpus", [0, 3])
def test_missing_and_shared_gpus_are_refused(gpus):
    with pytest.raises(UserError, match="device=cpu"):
        resolve_device("cuda", ENV, gpus)


def test_backend(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert resolve_backend("auto", cpu) == "gloo"
    assert [resolve_backend(wanted, gpu) for wanted in ("auto", "gloo", "nccl")] == ["nccl", "gloo", "nccl"]
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", cpu)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert resolve_backend("auto", gpu) == "gloo"
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", gpu)
