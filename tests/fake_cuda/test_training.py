"""The train command, unmodified, on the fake GPU."""

import json

import pytest
import torch

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

SETTINGS = ("data.name=digits", "train.epochs=1", "precision=fp32", "run.report=never", "checkpoint.resume=never")


def train(directory, name, *words, **options):
    """Train; return what was printed, the summary and the weights."""
    command = ("-m", "distlenet.train", *SETTINGS, f"run.dir={directory}", f"run.name={name}", *words)
    ended = run(*command, **options).succeeded()
    path = sorted((directory / name / "checkpoints").glob("step-*.pt"))[-1]
    summary = json.loads((directory / name / "summary.json").read_text())
    return ended, summary, torch.load(path, weights_only=True)["model"]


def test_the_fake_gpu_computes_what_the_cpu_computes(tmp_path):
    """12 steps. The optimizer rounds otherwise on a GPU (fused), so within float32's precision."""
    _, gpu, weights = train(tmp_path, "gpu", "device=cuda")
    _, cpu, expected = train(tmp_path, "cpu", "device=cpu")
    assert gpu["device"] == "cuda (Fake GPU)"
    assert gpu["backend"] == "nccl"
    assert gpu["test_loss"] == pytest.approx(cpu["test_loss"], rel=1e-5)
    assert gpu["test_loss"] < 2.2  # has learned
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
