"""Precision: its choice per device, autocast and loss scaling."""

import pytest
import torch

from distlenet.distributed.precision import autocast, make_scaler, resolve_precision
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_cpu():
    assert [resolve_precision(wanted, CPU) for wanted in ("auto", "fp32", "bf16")] == ["fp32", "fp32", "bf16"]
    with pytest.raises(UserError, match="precision=fp16"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("supported", "auto"), [(True, "bf16"), (False, "fp16")])
def test_gpu(monkeypatch, supported, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)
    assert resolve_precision("auto", GPU) == auto
    assert [resolve_precision(wanted, GPU) for wanted in ("fp32", "fp16")] == ["fp32", "fp16"]
    if not supported:
        with pytest.raises(UserError, match="precision=bf16"):
            resolve_precision("bf16", GPU)


def test_autocast_is_enabled_for_mixed_precision_only():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(precision, CPU):
            assert layer(x).dtype == dtype


def test_the_scaler_is_enabled_for_fp16_only():
    assert [make_scaler(p, GPU).is_enabled() for p in ("fp32", "bf16")] == [False, False]
    scaler = make_scaler("fp16", CPU)  # without CUDA, a scaler for CUDA is disabled
    assert scaler.is_enabled()
    assert scaler.get_scale() == 65536.0
