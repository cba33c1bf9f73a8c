"""A dry run reports what a job of that many ranks would do, and refuses what that job would refuse."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from torch import nn

from distlenet import train
from distlenet.config.loading import load_config
from distlenet.config.schema import ModelConfig
from distlenet.models.networks import make_model
from distlenet.training.dry_run import plan

pytestmark = pytest.mark.unit

DIGITS = ("data.name=digits", "device=cpu")


def plan_rows(world_size, *overrides):
    return dict(plan(load_config([], [*DIGITS, *overrides]), world_size))


def test_plan_of_many_ranks():
    rows = plan_rows(16, "train.global_batch_size=64", "train.accumulation_steps=2", "train.epochs=3")
    assert rows["global batch"] == "64 samples = ranks 16 × 4"
    assert rows["micro-batches"] == "2 a step, of up to 2 samples"
    assert rows["steps"] == "69 (3 epochs of 23); each epoch ends with a batch of 29; drops none"  # 1437 = 22 × 64 + 29


def test_plan_with_a_validation_set():
    rows = plan_rows(2, "data.validation=0.1", "checkpoint.keep_last=2")
    assert rows["data"] == "digits: 1,293 samples to train on, 144 to validate, 360 to test"
    assert rows["validation, test"] == "about 252 samples a rank, each epoch"
    assert rows["checkpoint"].endswith("for the 3 that are kept")
    assert plan_rows(2, "checkpoint.keep_last=2")["checkpoint"].endswith("for the 2 that are kept")


def test_plan_of_an_exact_run_that_drops_the_last_batch():
    settings = (
        "distributed.reduction=exact",
        "data.drop_last=true",
        "train.global_batch_size=1024",
        "train.max_steps=8",
    )
    rows = plan_rows(4, *settings)
    assert rows["ranks"] == "4: exact reduction, 4 virtual shards (auto)"
    assert rows["micro-batches"] == "1 a step, of up to 256 samples"
    assert rows["steps"] == "8 (8 epochs of 1); each epoch drops 413 samples"
    assert "  exact sums" in rows


def normalised_net():
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))


def test_all_shards_of_a_rank_are_in_memory_at_once_with_global_statistics():
    words = ("distributed.reduction=exact", "distributed.virtual_shards=4", f"model.name={__name__}:normalised_net")
    local, whole = plan_rows(2, *words), plan_rows(2, *words, "model.sync_batchnorm=true")
    for row in ("  gradients", "  activations"):
        size = float(local[row].removesuffix(" KB"))
        assert float(whole[row].removesuffix(" KB")) == pytest.approx(2 * size, abs=2 * 0.1)  # 4 shards on 2 ranks


def cumulative_net():
    model = normalised_net()
    model[1].momentum = None  # an average over all batches: reads how many there were
    return model


def test_activations_of_a_network_that_needs_values_are_unknown():
    rows = plan_rows(2, f"model.name={__name__}:cumulative_net")
    assert rows["  activations"] == "unknown: the loss needs the values of its inputs"
    assert rows["memory of a rank"].startswith("at least ")


def test_checkpoint_has_the_size_of_a_real_one(tmp_path):
    settings = ("train.max_steps=2", "run.name=run", f"run.dir={tmp_path}")
    size = plan_rows(1, *settings)["checkpoint"].partition(",")[0]
    train.train(load_config([], [*DIGITS, *settings]))
    real = (tmp_path / "run/checkpoints/step-00000002.pt").stat().st_size
    # A real one also holds the run's id and its results: some hundred bytes.
    assert float(size.removesuffix(" KB")) == pytest.approx(real / 1000, abs=1)
    assert not torch.distributed.is_initialized()


def test_activations_are_what_a_real_forward_pass_keeps():
    model = make_model(ModelConfig())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, labels = torch.randn(5, 1, 32, 32), torch.zeros(5, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = F.cross_entropy(model(inputs), labels, reduction="none")
        real = sum(saved.values())
    del loss
    size = plan_rows(1, "train.global_batch_size=5")["  activations"]
    # Printed in steps of 0.1 KB; the loss may keep up to 64 bytes more or less.
    assert float(size.removesuffix(" KB")) == pytest.approx(real / 1000, abs=0.05 + 0.064)


def test_settings_that_need_a_gpu_are_listed():
    rows = plan_rows(2, "device=cuda", "precision=fp16", "distributed.backend=nccl")
    assert rows["not checked here"] == "device=cuda, precision=fp16, distributed.backend=nccl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "3"], "is for --dry-run"),
        (["--dry-run", "--world-size", "0"], "--world-size: 0: expected an integer, at least 1"),
        (["--dry-run", "--world-size", "2000000"], "expected at most 1,000,000"),
        (["--dry-run", "--world-size", "3"], "is not divisible by 3 ranks"),
        (["--dry-run", "data.name=fashion_mnist", "data.root=none"], "python -m distlenet.data"),
        (["--dry-run", *DIGITS, "optim.warmup_steps=9999"], "the run has 96 steps; give fewer"),
    ],
)
def test_mistakes_are_refused_as_in_a_job(monkeypatch, tmp_path, fails, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distlenet.data.download.DEBIAN_DIRECTORY", {})
    monkeypatch.setattr(sys, "argv", ["distlenet", *arguments])
    assert message in fails(train.main)
    assert not list(tmp_path.iterdir())


def test_dry_run_is_refused_in_a_job_of_several_ranks(monkeypatch, fails):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(sys, "argv", ["distlenet", "--dry-run", *DIGITS])
    assert "start it alone" in fails(train.main)


@pytest.mark.slow
def test_4096_ranks_take_seconds_and_less_than_a_gigabyte(fashion_mnist):
    """10**9 bytes are promised. The CPU time shows that no rank is built: 4,096 loaders of 10 ms would take 40 s."""
    script = (  # ru_maxrss would be the parent's if that is larger
        "import resource, sys\nfrom distlenet import train\ntrain.main()\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(usage.ru_utime + usage.ru_stime, 1024 * int(peak.split()[1]), file=sys.stderr)"
    )
    arguments = ("--dry-run", "--world-size", "4096", "train.global_batch_size=8192")
    ended = run_command(sys.executable, "-c", script, *arguments).succeeded()
    assert "ranks 4,096 × 2" in ended.stdout
    seconds, size = map(float, ended.stderr.split())
    assert seconds < 40
    assert size < 10**9
