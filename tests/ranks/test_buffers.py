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
EXACT = ("distributed.reduction=exact", "distributed.virtual_shards=8")


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
    return train(tmp_path_factory.mktemp("exact") / "one", 1, *EXACT)


@pytest.mark.parametrize("ranks", [2, 4])
def test_exact_on_any_number_of_ranks(tmp_path, exact_on_one_rank, ranks):
    out = train(tmp_path / "out", ranks, *EXACT)
    assert differences(list(result(exact_on_one_rank)), list(result(out))) == []
    for state in states(out, ranks):
        assert differences(state, states(exact_on_one_rank, 1)[0]) == []


def test_exact_after_restarts_on_other_numbers_of_ranks(tmp_path, exact_on_one_rank):
    out = tmp_path / "out"
    for ranks, die_at in ((1, 3), (2, 8), (4, 11), (2, None)):
        train(out, ranks, *EXACT, die_at=die_at)
    assert differences(list(result(exact_on_one_rank)), list(result(out))) == []


def test_ddp_after_a_restart(tmp_path):
    more = ["distributed.reduction=ddp", "train.accumulation_steps=2"]
    whole = train(tmp_path / "whole", 2, *more)
    train(tmp_path / "broken", 2, *more, die_at=5)
    train(tmp_path / "broken", 2, *more)
    assert differences(list(result(whole)), list(result(tmp_path / "broken"))) == []


SYNC = ("model.sync_batchnorm=true", "data.drop_last=true")

# 12 steps. As in test_parity.py, float32 sums in another order change a step by 3.6e-6, here without clipping: the
# gradients are smaller than 5, too. BatchNorm divides by standard deviations, which are above 0.1 here: at most 10
# times the error.
TOLERANCE = 12 * 3.6e-6 * 10


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_global_statistics_do_not_depend_on_the_number_of_ranks(tmp_path):
    (plain,) = states(train(tmp_path / "plain", 1, "distributed.reduction=ddp", "data.drop_last=true"), 1)
    for ranks, reduction in ((1, "ddp"), (2, "ddp"), (4, "ddp"), (1, "exact")):
        out = train(tmp_path / f"{ranks}{reduction}", ranks, *SYNC, f"distributed.reduction={reduction}")
        first, *others = states(out, ranks)
        assert distance(first, plain) < TOLERANCE
        assert all(differences(first, other) == [] for other in others)
    # Evaluated as plain BatchNorm.
    assert evaluation(out)["test_loss"] == json.loads((out / "run/summary.json").read_text())["test_loss"]
    local = train(tmp_path / "local", 4, "distributed.reduction=ddp", "data.drop_last=true")
    assert distance(states(local, 4)[0], plain) > 10 * TOLERANCE


LOCKSTEP = (
    *EXACT,
    "model.sync_batchnorm=true",
    "model.name=batchnorm_net:ResidualNet",
    "precision=bf16",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def lockstep_on_one_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("lockstep") / "one", 1, *LOCKSTEP)


@pytest.mark.parametrize("starts", [[(4, None)], [(1, 3), (2, 8), (4, 11), (2, None)]], ids=["4", "1-2-4-2"])
def test_global_statistics_exact_on_any_number_of_ranks(tmp_path, lockstep_on_one_rank, starts):
    """The last batch of an epoch has a single image, so all ranks but one compute an example."""
    for ranks, die_at in starts:
        train(tmp_path / "out", ranks, *LOCKSTEP, f"data.num_workers={ranks // 2}", die_at=die_at)
    assert differences(list(result(lockstep_on_one_rank)), list(result(tmp_path / "out"))) == []
    for state in states(tmp_path / "out", starts[-1][0]):
        assert differences(state, states(lockstep_on_one_rank, 1)[0]) == []


def test_nonfinite_step_with_exact_global_statistics_is_explained(tmp_path):
    """Computing a step again needs all ranks, also those without samples."""
    more = (f"run.dir={tmp_path}", *LOCKSTEP, "optim.lr=1e30", "train.epochs=1", "data.synthetic_train=25")
    ended = run_ranks(4, DIRECTORY / "rank_program.py", tmp_path, *SETTINGS, *more)
    assert ended.status != 0
    assert "UserError: step 2: the loss of rank 0 is not finite" in ended.stderr, str(ended)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the last global batch has 1 samples, fewer than 2 ranks; give data.drop_last=true"),
        (["model.compile=true"], "was not tested with model.compile=true; give one of them only"),
        (["train.accumulation_steps=3"], "train.accumulation_steps=3 splits the global batch"),
    ],
)
def test_global_statistics_that_are_impossible_are_refused(tmp_path, words, message):
    more = (f"run.dir={tmp_path}", "model.sync_batchnorm=true", *words)
    ended = run_ranks(2, DIRECTORY / "rank_program.py", tmp_path, *SETTINGS, *more)
    assert ended.status != 0
    assert message in ended.stderr
