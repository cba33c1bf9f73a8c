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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_replayed_step_is_the_step(tmp_path, optimizer, precision):
    """To the bit: the learning rate is constant and exact in float32, which a replay reads. In two epochs, of 23 steps,
    samples and their augmentation differ."""
    words = (f"optim.name={optimizer}", "optim.lr=0.0078125", "optim.schedule=constant", "data.augment=shift")
    words += ("train.epochs=2", "train.global_batch_size=64", f"precision={precision}", "device=cuda")
    _, _, expected = train(tmp_path, "eager", "train.cuda_graph=off", *words)
    ended, _, weights = train(tmp_path, "replayed", "train.cuda_graph=auto", *words)
    assert "cuda_graph" not in ended.stderr
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_exact_gives_one_rank_and_two_the_same_bits(tmp_path):
    """Through real sums over NCCL, in graphs if there is one shard per rank."""
    words = ("distributed.reduction=exact", "distributed.virtual_shards=2", "data.augment=shift", "device=cuda")
    _, one, expected = train(tmp_path, "one", *words, "train.global_batch_size=64")
    ended, two, weights = train(tmp_path, "two", *words, "train.global_batch_size=64", "train.cuda_graph=auto", ranks=2)
    assert "cuda_graph" not in ended.stderr
    assert one["test_loss"] == two["test_loss"]
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
