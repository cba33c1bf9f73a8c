"""N ranks compute the same as one rank: equal steps, identical weights on all ranks, each test image once."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_ranks

from distlenet.models.lenet import Net

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("rank_program.py")

# 251 images in batches of 24: 10 full batches and one of 11, which 2, 3 and 4 ranks share unevenly; its
# micro-batches are uneven too. The test set of 1,001 images is divisible by none of these world sizes.
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

# The runs differ in the order in which up to 24 gradients of a batch are summed in float32: a relative error of at
# most 24 × 6e-8 = 1.4e-6 of a gradient, whose norm is clipped to 5. With Nesterov momentum 0.9 the error of one step's
# update is at most lr × 10 × gradient = 0.05 × 10 × 5 × 1.4e-6 = 3.6e-6; 33 steps with errors of the same sign add up
# to 1.2e-4. Observed: 1e-6. A sample too many or too few in the last batch, or a mean per rank, changes weights by
# 1e-3 or more (observed with a wrong scale).
TOLERANCE = 1.2e-4


def train(tmp_path: Path, ranks: int, *more: str) -> tuple[list[dict[str, torch.Tensor]], dict, list[dict]]:
    """Train; return each rank's weights, the summary and the history."""
    out = tmp_path / f"{ranks}-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    run_ranks(ranks, PROGRAM, out, *SETTINGS, f"run.dir={out}", "run.name=run", *more).succeeded()
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
    (reference,), reference_summary, reference_history = one_rank
    weights, summary, history = train(tmp_path, ranks)
    assert distance(weights[0], reference) < TOLERANCE
    for other in weights[1:]:
        assert distance(other, weights[0]) == 0  # replicas are bit-identical
    assert summary["world_size"] == ranks
    assert summary["test_count"] == reference_summary["test_count"] == 1001
    assert summary["steps"] == reference_summary["steps"] == 33
    assert [(r["split"], r["step"], r["count"]) for r in history] == [
        (r["split"], r["step"], r["count"]) for r in reference_history
    ]
    # The loss is a mean of values near 2.3; its error is that of the weights, summed over a few hundred of them.
    assert summary["test_loss"] == pytest.approx(reference_summary["test_loss"], abs=1e-3)
    counts = [r["count"] for r in history if r["split"] == "train"]
    assert counts == ([24] * 10 + [11]) * 3


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 3), (3, 2)])
def test_accumulation_equals_the_full_batch_also_in_an_uneven_last_one(tmp_path, one_rank, ranks, accumulation):
    (reference,), _, _ = one_rank
    weights, _, history = train(tmp_path, ranks, f"train.accumulation_steps={accumulation}")
    assert distance(weights[0], reference) < TOLERANCE
    assert [r["count"] for r in history if r["split"] == "train_epoch"] == [251] * 3


def test_loader_workers_do_not_change_the_result(tmp_path, one_rank):
    (reference,), _, _ = one_rank
    (weights,), _, _ = train(tmp_path, 1, "data.num_workers=2")
    assert distance(weights, reference) == 0


def test_drop_last(tmp_path):
    _, summary, history = train(tmp_path, 2, "data.drop_last=true", "train.epochs=1")
    assert summary["steps"] == 10
    assert {r["count"] for r in history if r["split"] == "train"} == {24}


def test_gradient_compression_changes_only_the_rounding(tmp_path):
    """One step with bf16 and one without differ only by rounding.

    bf16 has 8 significant bits, a relative error of at most 2**-9 per rounding. Each rank's share may be larger than
    the sum, here assumed up to 5 times: 3 roundings × 5 × 2**-9 = 3 % of the largest update.
    """
    torch.manual_seed(0)
    before = Net().state_dict()
    (uncompressed, _), _, _ = train(tmp_path, 2, "train.max_steps=1")
    (first, second), _, _ = train(tmp_path, 2, "train.max_steps=1", "distributed.gradient_compression=bf16")
    assert distance(first, second) == 0
    assert 0 < distance(first, uncompressed) < 0.03 * distance(before, uncompressed)
