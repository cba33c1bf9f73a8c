"""Losses with weights: the weighted mean over the global batch, whatever ranks and micro-batches it is split into."""

import json
from pathlib import Path

import pytest
import torch
from every_stop import differences, result
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("weighted_program.py")

# 145 images in batches of 24: 6 full ones and one of a single image, so that all ranks but one have none.
SETTINGS = (
    "device=cpu",
    "data.name=synthetic",
    "data.synthetic_train=145",
    "data.synthetic_test=101",
    "data.augment=flip_shift",
    "data.size=32",
    "train.global_batch_size=24",
    "train.epochs=2",
    "train.log_every=1",
    "train.max_grad_norm=5",
    "optim.lr=0.05",
)

# As in test_parity.py, of 14 steps instead of 33; in addition, float32 rounds the product of weight and loss, the sum
# of the weights, and the quotient: 3 more roundings of 6e-8 in each of 24 terms, at most twice the error there.
TOLERANCE = 1.2e-4


def train(tmp_path: Path, ranks: int, *more: str) -> Path:
    out = tmp_path / f"{ranks}-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    run_ranks(ranks, PROGRAM, out, *SETTINGS, f"run.dir={out}", "run.name=run", *more).succeeded()
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "rank0.pt", weights_only=True)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), 1, "distributed.reduction=ddp")


@pytest.mark.parametrize(
    ("ranks", "accumulation", "more"),
    [
        (1, 3, ()),
        (2, 1, ()),
        (2, 3, ()),
        (3, 1, ()),
        (3, 3, ("distributed.allow_uneven_batches=true", "distributed.shared_memory=off")),
        (4, 1, ()),
        (4, 3, ()),
    ],
)
def test_ranks_and_micro_batches_do_not_change_the_weighted_mean(tmp_path, one_rank, ranks, accumulation, more):
    out = train(tmp_path, ranks, "distributed.reduction=ddp", f"train.accumulation_steps={accumulation}", *more)
    assert distance(weights(out), weights(one_rank)) < TOLERANCE
    for ours, expected in zip(records(out), records(one_rank), strict=True):
        assert (ours["split"], ours["step"], ours["count"]) == (expected["split"], expected["step"], expected["count"])
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-3)


def test_exact_on_any_number_of_ranks(tmp_path):
    exact = ["distributed.reduction=exact", "distributed.virtual_shards=8", "distributed.allow_uneven_batches=true"]
    one, *others = [train(tmp_path, ranks, *exact) for ranks in (1, 2, 3, 4)]
    for other in others:
        assert differences(list(result(one)), list(result(other))) == []


def test_exact_equals_ddp(tmp_path, one_rank):
    exact = train(tmp_path, 2, "distributed.reduction=exact", "distributed.virtual_shards=8")
    assert distance(weights(exact), weights(one_rank)) < TOLERANCE


def test_compression_does_not_round_the_sum_of_the_weights(tmp_path):
    """As in test_parity.py: bf16 changes a gradient by at most 3 % of the largest update."""
    one_step = ["distributed.reduction=ddp", "train.max_steps=1"]
    plain = weights(train(tmp_path, 2, *one_step))
    compressed = weights(train(tmp_path, 2, *one_step, "distributed.gradient_compression=bf16"))
    before = weights(train(tmp_path, 2, *one_step, "optim.lr=1e-30"))
    assert 0 < distance(compressed, plain) < 0.03 * distance(before, plain)
