"""The device, backend and precision of a rank."""

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed.context import DistributedContext
from distlenet.distributed.device import make_scaler, resolve_backend, resolve_device, resolve_precision
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
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


@pytest.mark.parametrize(("gpus", "message"), [(0, "sees no GPU; set device=cpu"), (3, "4 ranks .* 3 visible GPUs")])
def test_missing_and_shared_gpus_are_refused(gpus, message):
    with pytest.raises(UserError, match=message):
        resolve_device("cuda", ENV, gpus)


def test_backend(monkeypatch):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert resolve_backend("auto", CPU) == "gloo"
    assert [resolve_backend(wanted, GPU) for wanted in ("auto", "gloo", "nccl")] == ["nccl", "gloo", "nccl"]
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", CPU)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert resolve_backend("auto", GPU) == "gloo"
    with pytest.raises(UserError, match="backend=nccl"):
        resolve_backend("nccl", GPU)


def test_precision_on_cpu():
    assert [resolve_precision(wanted, CPU) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match="precision=fp16"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("supported", "auto"), [(True, "bf16"), (False, "fp16")])
def test_precision_on_gpu(monkeypatch, supported, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert resolve_precision("auto", GPU) == auto
    assert [resolve_precision(wanted, GPU) for wanted in ("fp32", "fp16")] == ["fp32", "fp16"]
    if not supported:
        with pytest.raises(UserError, match="precision=bf16"):
            resolve_precision("bf16", GPU)


def test_autocast_is_enabled_for_mixed_precision_only():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        context = DistributedContext(DistributedEnvironment(), CPU, "gloo", precision, watchdog=None, log=None)
        with context.autocast():
            assert layer(x).dtype == dtype


def test_the_scaler_is_enabled_for_fp16_only():
    assert [make_scaler(p, GPU).is_enabled() for p in ("fp32", "bf16")] == [False, False]
    scaler = make_scaler("fp16", CPU)  # without CUDA, a scaler for CUDA is disabled
    assert scaler.is_enabled()
    assert scaler.get_scale() == 65536.0
