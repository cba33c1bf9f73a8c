"""The GPU paths, on a machine that has one."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPUS, CommandResult, run_command

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not GPUS, reason="no CUDA device is visible to PyTorch")]


def run(*words: object) -> CommandResult:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` on the GPUs."""
    return run_command(sys.executable, *words, env={"CUDA_VISIBLE_DEVICES": GPUS})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_one_gpu(tmp_path, precision):
    words = ("data.name=digits", "train.epochs=20", "optim.lr=0.1", f"run.dir={tmp_path}", "run.name=run")
    run("-m", "distlenet.train", *words, f"precision={precision}").succeeded()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["backend"] == "nccl"
    assert summary["device"].startswith("cuda (")
    assert summary["precision"] == precision
    assert summary["test_accuracy"] >= 0.95
    assert summary["test_count"] == 360


def test_a_rank_that_is_forked_uses_the_gpu(tmp_path):
    words = ("data.name=digits", "train.epochs=1", f"run.dir={tmp_path}", "run.name=run")
    launcher = ("-m", "distlenet.launch", "--standalone", "--nproc-per-node=1")
    ended = run(*launcher, "-m", "distlenet.train", *words).succeeded()
    assert "no warm start" not in ended.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["device"].startswith("cuda (")


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    words = ("data.name=digits", "precision=fp16", "train.epochs=2", "run.name=run", f"run.dir={tmp_path}")
    run("-m", "distlenet.train", *words).succeeded()
    path = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    assert torch.load(path, weights_only=True)["scaler"]["scale"] > 0
    ended = run("-m", "distlenet.train", *words).succeeded()
    assert "this run is complete" in ended.stdout


@pytest.mark.parametrize(
    "more",
    [
        ("distributed.reduction=ddp",),
        ("distributed.reduction=exact",),
        ("distributed.gradient_compression=bf16",),
        ("data.device=cpu",),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_step_is_the_step(tmp_path, more, optimizer, precision):
    """The same kernels on the same numbers, so the same bits.

    A replay reads the learning rate in float32. It is a power of two in all steps: float32 does not round it.
    """
    words = ("data.name=digits", "train.epochs=2", "train.global_batch_size=64", f"run.dir={tmp_path}")
    words += ("optim.lr=0.0078125", "optim.schedule=constant", "optim.warmup_steps=0")
    words += (f"optim.name={optimizer}", *more, "distributed.virtual_shards=1")
    nets = {}
    for graph in ("off", "auto"):
        settings = (f"train.cuda_graph={graph}", f"run.name={graph}", f"precision={precision}", "data.augment=shift")
        ended = run("-m", "distlenet.train", *words, *settings).succeeded()
        assert "cuda_graph" not in ended.stderr  # no reason why not
        path = sorted((tmp_path / graph / "checkpoints").glob("step-*.pt"))[-1]
        nets[graph] = torch.load(path, weights_only=True)["model"]
    for name, value in nets["off"].items():
        assert torch.equal(nets["auto"][name], value), name


def test_random_numbers_in_a_graph_have_the_bits_of_the_cpu():
    ended = run(Path(__file__).parent / "draws_in_a_graph.py").succeeded()
    assert ended.stdout.split() == ["uniform", "normal", "integers", "choice", "bernoulli"]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_images_on_either_side_give_the_same_run(tmp_path, where):
    words = ("data.name=digits", "train.epochs=2", f"run.dir={tmp_path}", "run.name=run", f"data.device={where}")
    run("-m", "distlenet.train", *words).succeeded()
    twice = ("data.name=digits", "train.epochs=2", f"run.dir={tmp_path}", "run.name=auto")
    run("-m", "distlenet.train", *twice).succeeded()
    losses = [json.loads((tmp_path / name / "summary.json").read_text())["test_loss"] for name in ("run", "auto")]
    assert losses[0] == losses[1]
