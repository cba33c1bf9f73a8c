"""N ranks compute what one does: the same steps, equal weights on all ranks, each test image once."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_torchrun

from distlenet.models.lenet import Net

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("rank_program.py")

# 251 images in batches of 24: 10 full ones and one of 11, which 2, 3 and 4 ranks share unevenly; in
# micro-batches it is also ragged. The test set of 1,001 divides by no world size but 1.
SETTINGS = (
    "device=cpu",
    "distributed.reduction=ddp",
    "data.name=synthetic",
    "data.synthetic_train=251",
    "data.synthetic_test=1001",
    "data.augment=flip_shift",
    "train.global_batch_size=24",
    "train.epochs=3",
    "train.log_every=1",
    "train.max_grad_norm=5",
    "optim.lr=0.05",
)

# Why this tolerance. The runs differ in the order in which the up to 24 gradients of a batch are summed in
# float32: a relative error of at most 24 × 6e-8 = 1.4e-6 of a gradient, whose norm clipping bounds by 5. With
# Nesterov momentum 0.9 a step moves a weight by up to lr × 10 × gradient = 0.05 × 10 × 5 × 1.4e-6 = 3.6e-6 more
# or less; 33 steps of such errors, all of one sign, make 1.2e-4. Seen: 1e-6. One image too many or too few in
# the last batch, or its mean taken per rank, moves weights by 1e-3 and more (seen with the scale left out).
TOLERANCE = 1.2e-4


def train(tmp_path: Path, ranks: int, *more: str) -> tuple[list[dict[str, torch.Tensor]], dict, list[dict]]:
    """Train, and return each rank's weights, the summary and the history."""
    out = tmp_path / f"{ranks}-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    run_torchrun(ranks, PROGRAM, out, *SETTINGS, f"run.dir={out}", "run.name=run", *more).succeeded()
    weights = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    history = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    return weights, json.loads((out / "run/summary.json").read_text()), history


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_n_ranks_match_one(tmp_path, one_rank, ranks):
    (alone,), summary_of_one, history_of_one = one_rank
    weights, summary, history = train(tmp_path, ranks)
    assert distance(weights[0], alone) < TOLERANCE
    for other in weights[1:]:
        assert distance(other, weights[0]) == 0  # replicas are equal to the bit
    assert summary["world_size"] == ranks
    assert summary["test_count"] == summary_of_one["test_count"] == 1001
    assert summary["steps"] == summary_of_one["steps"] == 33
    assert [(r["split"], r["step"], r["count"]) for r in history] == [
        (r["split"], r["step"], r["count"]) for r in history_of_one
    ]
    # A loss is a mean of values near 2.3: the same order of error as the weights, times a few hundred weights' sum.
    assert summary["test_loss"] == pytest.approx(summary_of_one["test_loss"], abs=1e-3)
    counts = [r["count"] for r in history if r["split"] == "train"]
    assert counts == ([24] * 10 + [11]) * 3


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 3), (3, 2)])
def test_accumulation_is_the_big_batch_also_in_the_ragged_last_window(tmp_path, one_rank, ranks, accumulation):
    (alone,), _, _ = one_rank
    weights, _, history = train(tmp_path, ranks, f"train.accumulation_steps={accumulation}")
    assert distance(weights[0], alone) < TOLERANCE
    assert [r["count"] for r in history if r["split"] == "train_epoch"] == [251] * 3


def test_loader_workers_change_nothing(tmp_path, one_rank):
    (alone,), _, _ = one_rank
    (weights,), _, _ = train(tmp_path, 1, "data.num_workers=2")
    assert distance(weights, alone) == 0


def test_dropping_the_last_batch(tmp_path):
    _, summary, history = train(tmp_path, 2, "data.drop_last=true", "train.epochs=1")
    assert summary["steps"] == 10
    assert {r["count"] for r in history if r["split"] == "train"} == {24}


def test_gradients_may_travel_as_bf16(tmp_path):
    """One step with, one without: they differ by the rounding alone.

    bf16 holds 8 significant bits: what a rank sends and each sum is off by 2**-9 of itself at most. Two ranks' shares
    may each be larger than their sum, taken as up to 5 times: 3 roundings × 5 × 2**-9 = 3 % of the largest update.
    """
    torch.manual_seed(0)
    before = Net().state_dict()
    (plain, _), _, _ = train(tmp_path, 2, "train.max_steps=1")
    (one, other), _, _ = train(tmp_path, 2, "train.max_steps=1", "distributed.gradient_compression=bf16")
    assert distance(one, other) == 0
    assert 0 < distance(one, plain) < 0.03 * distance(before, plain)
