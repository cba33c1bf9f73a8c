"""The GPU paths, on a machine that has one."""

import json
import sys

import pytest
import torch
from conftest import run_command

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to PyTorch"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_one_gpu(tmp_path, precision):
    words = ("data.name=digits", "train.epochs=20", "optim.lr=0.1", f"run.dir={tmp_path}", "run.name=run")
    run_command(sys.executable, "-m", "distlenet.train", *words, f"precision={precision}").succeeded()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["backend"] == "nccl"
    assert summary["device"].startswith("cuda (")
    assert summary["precision"] == precision
    assert summary["test_accuracy"] >= 0.95
    assert summary["test_count"] == 360


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    words = ("data.name=digits", "precision=fp16", "train.epochs=2", "run.name=run", f"run.dir={tmp_path}")
    run_command(sys.executable, "-m", "distlenet.train", *words).succeeded()
    path = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    assert torch.load(path, weights_only=True)["scaler"]["scale"] > 0
    ended = run_command(sys.executable, "-m", "distlenet.train", *words).succeeded()
    assert "this run is complete" in ended.stdout
