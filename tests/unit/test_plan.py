"""A dry run: what it says is what a job of that many ranks does, and it refuses what that job would."""

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command

from distlenet import train
from distlenet.config.loading import load_config
from distlenet.models.registry import make_model
from distlenet.training.dry_run import activations, plan

pytestmark = pytest.mark.unit

DIGITS = ("data.name=digits", "device=cpu")


def planned(world_size, *words):
    return dict(plan(load_config([], [*DIGITS, *words]), world_size))


def test_the_plan_of_many_ranks():
    rows = planned(16, "train.global_batch_size=64", "train.accumulation_steps=2", "train.epochs=3")
    assert rows["global batch"] == "64 images = ranks 16 × 4"
    assert rows["micro-batches"] == "2 a step, of up to 2 images"
    assert rows["steps"] == "69 (3 epochs of 23); each epoch ends with a batch of 29; drops none"  # 1437 = 22 × 64 + 29


def test_the_plan_of_an_exact_run_that_drops():
    words = ("distributed.reduction=exact", "data.drop_last=true", "train.global_batch_size=128", "train.max_steps=16")
    rows = planned(4, *words)
    assert rows["ranks"] == "4: exact reduction, 8 virtual shards"
    assert rows["micro-batches"] == "2 a step, of up to 16 images"
    assert rows["steps"] == "16 (1.45455 epochs of 11); each epoch drops 29 images"
    assert "  exact sums" in rows


def test_the_checkpoint_is_as_large_as_a_real_one(tmp_path):
    words = ("train.max_steps=2", "run.name=run", f"run.dir={tmp_path}")
    size = planned(1, *words)["checkpoint"].partition(",")[0]
    train.train(load_config([], [*DIGITS, *words]))
    real = (tmp_path / "run/checkpoints/step-00000002.pt").stat().st_size
    # A real one also holds the run's id and its results: some hundred bytes.
    assert float(size.removesuffix(" KB")) == pytest.approx(real / 1000, abs=1)
    assert not torch.distributed.is_initialized()


def test_activations_are_what_a_real_forward_keeps():
    net = make_model("lenet", True, torch.device("cpu"))
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, labels = torch.randn(5, 1, 32, 32), torch.zeros(5, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(net(inputs), labels)
        real = sum(kept.values())
    del loss
    # Within 64 bytes: the loss keeps a number more or less.
    assert activations(load_config(), 5) == pytest.approx(real, abs=64)


def test_what_needs_a_gpu_is_told():
    rows = planned(2, "device=cuda", "precision=fp16", "distributed.backend=nccl")
    assert rows["not looked at here"] == "device=cuda, precision=fp16, distributed.backend=nccl"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--world-size", "3"], "is for --dry-run"),
        (["--dry-run", "--world-size", "0"], "--world-size: 0: expected an integer, at least 1"),
        (["--dry-run", "--world-size", "2000000"], "expected at most 1,000,000"),
        (["--dry-run", "--world-size", "3"], "does not divide by 3 ranks"),
        (["--dry-run", "data.name=fashion_mnist", "data.root=none"], "python -m distlenet.data"),
        (["--dry-run", *DIGITS, "optim.warmup_steps=9999"], "the run has 96 steps; give fewer"),
    ],
)
def test_what_a_job_would_refuse(monkeypatch, tmp_path, fails, words, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distlenet.data.download.DEBIAN_DIRECTORY", {})
    monkeypatch.setattr(sys, "argv", ["distlenet", *words])
    assert part in fails(train.main)
    assert not list(tmp_path.iterdir())


def test_among_ranks_it_is_refused(monkeypatch, fails):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(sys, "argv", ["distlenet", "--dry-run", *DIGITS])
    assert "start it alone" in fails(train.main)


def test_4096_ranks_take_seconds_and_less_than_a_gigabyte(fashion_mnist):
    """Ten seconds and 10**9 bytes are promised. The time is the run's own processor time."""
    script = (  # ru_maxrss would be the parent's where that is larger
        "import resource, sys\nfrom distlenet import train\ntrain.main()\n"
        "own = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(own.ru_utime + own.ru_stime, 1024 * int(peak.split()[1]), file=sys.stderr)"
    )
    words = ("--dry-run", "--world-size", "4096", "train.global_batch_size=8192")
    ended = run_command(sys.executable, "-c", script, *words).succeeded()
    assert "ranks 4,096 × 2" in ended.stdout
    seconds, size = map(float, ended.stderr.split())
    assert seconds < 10
    assert size < 10**9
