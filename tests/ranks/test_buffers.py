"""Running statistics: the same on all ranks, those of the checkpoint, and with ``exact`` of any number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from every_stop import differences, result
from forked import run_python, run_ranks

pytestmark = pytest.mark.ranks

DIRECTORY = Path(__file__).parent
MODEL = "model.name=batchnorm_net:BatchNormNet"

# 145 images in batches of 24: 6 full ones, and one of a single image, so that all ranks but one have none.
SETTINGS = (
    "device=cpu",
    "data.name=synthetic",
    "data.synthetic_train=145",
    "data.synthetic_test=203",
    "data.augment=flip_shift",
    "train.global_batch_size=24",
    "train.epochs=2",
    "train.log_every=1",
    "train.check_replicas_every=1",
    "optim.lr=0.05",
    "checkpoint.every_steps=1",
    MODEL,
)


def train(out: Path, ranks: int, *more: str, die_at: int | None = None) -> Path:
    out.mkdir(exist_ok=True)
    kill = ("--die-at", die_at) if die_at is not None else ()
    ended = run_ranks(
        ranks, DIRECTORY / "rank_program.py", out, *kill, *SETTINGS, f"run.dir={out}", "run.name=run", *more
    )
    assert (ended.status == 0) == (die_at is None), str(ended)
    return out


def states(out: Path, ranks: int) -> list[dict[str, torch.Tensor]]:
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def evaluation(out: Path) -> dict:
    words = ("--json", f"checkpoint={out / 'run'}", MODEL)
    return json.loads(run_python(DIRECTORY / "evaluate_program.py", *words).succeeded().stdout)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_logged_test_metrics_are_those_of_the_last_checkpoint(tmp_path, ranks, accumulation):
    more = ["distributed.reduction=ddp", f"train.accumulation_steps={accumulation}"]
    out = train(tmp_path / "out", ranks, *more)
    summary = json.loads((out / "run/summary.json").read_text())
    evaluated = evaluation(out)
    assert evaluated["step"] == summary["steps"] == 14
    assert {key: summary[key] for key in ("test_loss", "test_accuracy", "test_count")} == {
        key: evaluated[key] for key in ("test_loss", "test_accuracy", "test_count")
    }
    first, *others = states(out, ranks)
    for other in others:
        assert differences(first, other) == []
    assert int(first["1.num_batches_tracked"]) == int(first["4.num_batches_tracked"]) == 14
    assert first["mask"].tolist() == [0.0] * 3 + [torch.tensor(-1e30).item()] + [0.0] * 6
    assert float(first["1.running_mean"].abs().max()) > 0


@pytest.fixture(scope="module")
def exact_on_one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("exact") / "one", 1, "distributed.reduction=exact")


@pytest.mark.parametrize("ranks", [2, 4])
def test_exact_on_any_number_of_ranks(tmp_path, exact_on_one_rank, ranks):
    out = train(tmp_path / "out", ranks, "distributed.reduction=exact")
    assert differences(list(result(exact_on_one_rank)), list(result(out))) == []
    for state in states(out, ranks):
        assert differences(state, states(exact_on_one_rank, 1)[0]) == []


def test_exact_after_restarts_on_other_numbers_of_ranks(tmp_path, exact_on_one_rank):
    out = tmp_path / "out"
    for ranks, die_at in ((1, 3), (2, 8), (4, 11), (2, None)):
        train(out, ranks, "distributed.reduction=exact", die_at=die_at)
    assert differences(list(result(exact_on_one_rank)), list(result(out))) == []


def test_ddp_after_a_restart(tmp_path):
    more = ["distributed.reduction=ddp", "train.accumulation_steps=2"]
    whole = train(tmp_path / "whole", 2, *more)
    train(tmp_path / "broken", 2, *more, die_at=5)
    train(tmp_path / "broken", 2, *more)
    assert differences(list(result(whole)), list(result(tmp_path / "broken"))) == []
