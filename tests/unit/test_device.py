"""The device, backend and precision of a rank."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed.context import DistributedContext, set_flight_recorder_size
from distlenet.distributed.device import (
    DeviceChoice,
    VisibleGpus,
    make_scaler,
    resolve_backend,
    resolve_devices,
    resolve_precision,
)
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.visible_gpus import agree_on_device, visible_gpus
from distlenet.utils.errors import RankError, UserError

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def ranks_that_see(*text: str) -> list[VisibleGpus]:
    """Return what ranks see: ``x:abC`` is a rank on host x with the GPUs a, b and C, which does not support bf16."""
    hosts = [rank.split(":") for rank in text]
    return [VisibleGpus(host, list(gpus), [gpu.islower() for gpu in gpus]) for host, gpus in hosts]


@pytest.mark.parametrize(
    ("ranks", "devices"),
    [
        (["x:a"], "0"),
        (["x:abcd"] * 4, "0 1 2 3"),  # torchrun
        (["x:ab", "x:ab", "y:ab", "y:ab"], "0 1 0 1"),  # hosts whose GPUs have the same names
        (["x:a", "x:b", "y:c", "y:d"], "0 0 0 0"),  # --gpus-per-task=1, --gpu-bind=single:1, or a wrapper
        (["x:ab", "x:cd"], "0 0"),  # --gpus-per-task=2
        (["x:ab", "x:ab", "x:cd", "x:cd"], "0 1 0 1"),  # --gpu-bind=closest, on a host with two sockets
        (["x:ab", "x:ba"], "0 0"),
        (["x:ab", "x:a", "x:abc"], None),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_each_rank_has_its_own_gpu(wanted, ranks, devices):
    choices = resolve_devices(wanted, ranks_that_see(*ranks))
    if devices is None:  # rank 0 has taken the only GPU of rank 1
        assert "no unused GPU on x for rank 1" in choices[0].warning + choices[0].error
    else:
        assert choices == [DeviceChoice(f"cuda:{index}") for index in devices.split()]


def test_the_cpu():
    assert resolve_devices("cpu", ranks_that_see("x:ab", "x:ab")) == [DeviceChoice("cpu")] * 2
    assert resolve_devices("auto", ranks_that_see("x:", "y:")) == [DeviceChoice("cpu")] * 2


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        (["x:ab"] * 4, "4 ranks on x share 2 GPUs; start one rank per GPU"),
        (["x:a", "x:"], "2 ranks on x share 1 GPU; start one rank per GPU"),
        (["x:", "y:a", "y:a"], "PyTorch sees no GPU on x for rank 0; check CUDA_VISIBLE_DEVICES and the driver"),
    ],
)
def test_without_a_gpu_for_each_rank_all_use_the_cpu_and_the_reason_is_reported(ranks, reason):
    warning = f"device=auto: training on the CPU, since {reason}"
    assert resolve_devices("auto", ranks_that_see(*ranks)) == [DeviceChoice("cpu", warning)] * len(ranks)
    choices = resolve_devices("cuda", ranks_that_see(*ranks))
    assert choices == [DeviceChoice("cpu", error=f"device=cuda: {reason}, or set device=cpu")] * len(ranks)


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        (["x:ab", "x:ab", "y:", "y:"], "PyTorch sees no GPU on y for ranks 2, 3, but others have one; check CUDA_"),
        (["x:a", "x:a", "y:ab", "y:ab"], "2 ranks on x share 1 GPU, but others have one; start one rank per GPU, or"),
    ],
)
def test_a_job_on_gpus_and_cpus_is_refused_on_all_ranks(ranks, found):
    """Each host would choose another backend, and wait for the others."""
    choices = resolve_devices("auto", ranks_that_see(*ranks))
    assert len(set(choices)) == 1
    assert choices[0].error.startswith(f"device=auto: {found}")


def agree(wanted, ranks):
    """Return the choice of each rank, each in a thread with the same store."""
    store = dist.HashStore()

    def run(rank):
        env = DistributedEnvironment(rank, world_size=len(ranks))
        return agree_on_device(wanted, ranks[rank], env, store, timeout_s=20)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, range(len(ranks))))


def test_ranks_agree_through_the_store():
    assert [choice.device for choice in agree("auto", ranks_that_see("x:a", "x:b"))] == ["cuda:0", "cuda:0"]
    assert [choice.device for choice in agree("auto", ranks_that_see("x:ab", "x:ab"))] == ["cuda:0", "cuda:1"]
    mixed = agree("auto", ranks_that_see("x:a", "y:"))
    assert mixed[0] == mixed[1]
    assert "no GPU on y" in mixed[0].error


@pytest.mark.parametrize(("rank", "missing"), [(0, "ranks 1, 2"), (1, "ranks 0, 2")])
def test_a_rank_that_does_not_answer_is_named(rank, missing):
    gpus, env = VisibleGpus("x", [], []), DistributedEnvironment(rank, world_size=3)
    with pytest.raises(RankError, match=rf"{missing} did not join in time \(distributed\.init_timeout_s\)"):
        agree_on_device("auto", gpus, env, dist.HashStore(), timeout_s=0.1)


def test_rank_0_waits_until_all_have_read_their_device():
    """Its process may hold the store, and end with an error."""
    gpus, store = VisibleGpus("x", [], []), dist.HashStore()
    store.set("gpus/1", json.dumps(gpus))  # by a rank that does not read
    with pytest.raises(RankError, match="rank 1 did not join in time"):
        agree_on_device("auto", gpus, DistributedEnvironment(0, world_size=2), store, timeout_s=0.1)
    assert DeviceChoice(*json.loads(store.get("device/1"))) == DeviceChoice("cpu")


def test_gpus_are_not_initialized_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = [SimpleNamespace(uuid="GPU-a", major=9), SimpleNamespace(uuid="GPU-b", major=7)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert visible_gpus("auto")[1:] == (["GPU-a", "GPU-b"], [True, False])
    assert visible_gpus("cpu")[1:] == ([], [])


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
    assert [resolve_precision(wanted, CPU, True) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match="precision=fp16"):
        resolve_precision("fp16", CPU, True)


@pytest.mark.parametrize(("supported", "auto"), [(True, "bf16"), (False, "fp16")])
def test_precision_on_gpu(supported, auto):
    assert resolve_precision("auto", GPU, supported) == auto
    assert [resolve_precision(wanted, GPU, supported) for wanted in ("fp32", "fp16")] == ["fp32", "fp16"]
    if not supported:
        with pytest.raises(UserError, match="precision=bf16"):
            resolve_precision("bf16", GPU, supported)


def test_ranks_on_different_gpus_have_the_same_precision():
    """One GPU without bf16 is enough, if a rank uses it."""
    for seen, bf16 in ((["x:a", "y:B"], False), (["x:ab", "y:aB"], True), (["x:aB", "x:aB"], False)):
        assert [choice.bf16 for choice in resolve_devices("auto", ranks_that_see(*seen))] == [bf16, bf16]


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


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        ({"TORCH_FR_BUFFER_SIZE": "9"}, {"TORCH_FR_BUFFER_SIZE": "9"}),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "9"}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9"}),
    ],
)
def test_the_size_of_the_flight_recorder_has_one_name(given, names):
    """With both names, torch warns on every rank that one is deprecated."""
    set_flight_recorder_size(environ := dict(given))
    assert environ == names
