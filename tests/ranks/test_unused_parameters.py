"""Parameters that a loss does not depend on: an error by default, a gradient of 0 if they are allowed, and in exact."""

from pathlib import Path

import pytest
import torch
from branches_net import BranchesNet
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("rank_program.py")
ALLOWED = "distributed.find_unused_parameters=true"

# 49 images in batches of 24: in the last batch, of one image, only one rank has a sample.
SETTINGS = (
    "device=cpu",
    "data.name=synthetic",
    "data.synthetic_train=49",
    "data.synthetic_test=20",
    "train.global_batch_size=24",
    "train.epochs=2",
    "train.check_replicas_every=1",
    "optim.lr=0.05",
    "optim.weight_decay=0.01",
)


def train(tmp_path: Path, ranks: int, model: str, *more: str, fails: bool = False):
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    words = (*SETTINGS, f"model.name=branches_net:{model}", f"run.dir={out}", "run.name=run", *more)
    ended = run_ranks(ranks, PROGRAM, out, *words)
    if fails:
        assert ended.status != 0
        return ended.stderr
    ended.succeeded()
    return torch.load(out / "rank0.pt", weights_only=True)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("ranks", [1, 2])
def test_unused_parameters_are_named_with_the_setting_that_allows_them(tmp_path, ranks):
    stderr = train(tmp_path, ranks, "UnusedLayerNet", fails=True)
    assert (
        "the loss does not depend on unused.weight, unused.bias: each step must give every trainable parameter a "
        "gradient; give distributed.find_unused_parameters=true, or exclude them with requires_grad_(False)"
    ) in stderr


def test_layers_of_the_training_mode_need_no_setting(tmp_path):
    train(tmp_path, 2, "TrainingLayerNet")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_layers_in_each_micro_batch(tmp_path, ranks):
    """Compared with exact, whose micro-batches are the same if each rank has one shard."""
    uneven = "distributed.allow_uneven_batches=true"
    one_shard = f"distributed.virtual_shards={ranks}"
    exact = train(tmp_path, ranks, "BranchesNet", "distributed.reduction=exact", one_shard)
    for shared_memory in ("auto", "off"):
        ddp = train(tmp_path, ranks, "BranchesNet", ALLOWED, uneven, f"distributed.shared_memory={shared_memory}")
        assert distance(ddp, exact) < 2e-5  # six steps of float32 sums of 24 gradients: a fifth of those of test_parity
    torch.manual_seed(0)
    before = BranchesNet().unused.weight.detach().norm()
    assert float(ddp["unused.weight"].norm()) < float(before)  # a gradient of 0, but weight decay
