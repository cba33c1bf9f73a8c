"""Bit-identical results on any number of ranks, and after any number of stops at any step."""

import json
import re
from pathlib import Path

import pytest
import torch
from every_stop import differences, result
from forked import run_python, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

DIRECTORY = Path(__file__).parent

# 315 images in batches of 16 are 20 steps per epoch; the last batch has 11 images, uneven over 8 shards.
SETTINGS = (
    "device=cpu",
    "distributed.reduction=exact",
    "distributed.virtual_shards=8",
    "data.name=synthetic",
    "data.synthetic_train=315",
    "data.synthetic_test=999",
    "data.augment=flip_shift",
    "train.global_batch_size=16",
    "train.epochs=2",
    "train.log_every=3",
    "train.max_grad_norm=1",
    "train.check_replicas_every=7",
    "optim.lr=0.05",
    "checkpoint.every_steps=1",
)


@pytest.mark.parametrize(
    ("stops", "more"),
    [
        (19, ["data.synthetic_train=155"]),  # two epochs of 10 steps, with a last batch of 11 images
        (11, ["train.max_steps=12", "train.epochs=1", "precision=bf16", "optim.name=adamw", "data.num_workers=1"]),
    ],
)
def test_stop_after_any_step_does_not_change_the_result(tmp_path, stops, more):
    ended = run_python(DIRECTORY / "every_stop.py", tmp_path, *SETTINGS, *more, timeout=500).succeeded()
    assert ended.stdout == f"{stops} stops, all equal\n"


def train(out: Path, ranks: int, *more: str, die_at: int | None = None, program: str = "rank_program.py"):
    """Train in ``out`` to the end, or until the last rank kills itself before step ``die_at``."""
    out.mkdir(exist_ok=True)
    kill = ("--die-at", die_at) if die_at is not None else ()
    ended = run_ranks(ranks, DIRECTORY / program, out, *kill, *SETTINGS, f"run.dir={out}", "run.name=run", *more)
    assert (ended.status == 0) == (die_at is None), str(ended)
    return ended


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "one_rank"
    train(out, 1)
    return out


def assert_equal(a: Path, b: Path) -> None:
    """Compare the final checkpoints, the histories, and the parts of the summaries that do not depend on ranks."""
    assert differences(list(result(a)), list(result(b))) == []
    summaries = [json.loads((out / "run/summary.json").read_text()) for out in (a, b)]
    for key in ("test_loss", "test_accuracy", "test_count", "steps", "epochs"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks(tmp_path, one_rank, ranks):
    train(tmp_path / "out", ranks)
    assert_equal(one_rank, tmp_path / "out")


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_with_unequal_shares(tmp_path, one_rank, ranks):
    """8 shards on 3 ranks are 3 + 3 + 2; on 5 ranks, 2 + 2 + 2 + 1 + 1."""
    train(tmp_path / "out", ranks, "distributed.allow_uneven_batches=true")
    assert_equal(one_rank, tmp_path / "out")


def test_restarts_on_other_numbers_of_ranks_and_their_ledger(tmp_path, one_rank):
    out = tmp_path / "out"
    ledger = "data.ledger=true"
    # With a checkpoint every third step, the steps after the last checkpoint are lost and repeated.
    sparse = "checkpoint.every_steps=3"
    train(out, 1, ledger, sparse, die_at=7)
    train(out, 2, ledger, sparse, die_at=20)
    train(out, 4, ledger, sparse, die_at=29)
    ended = train(out, 1, ledger, sparse)
    assert "resumed at step 27 of 40" in ended.stdout
    assert_equal(one_rank, out)
    lines = run_python("-m", "distlenet.ledger", out / "run").succeeded().stdout.splitlines()
    assert lines == [
        "epoch 1: 315 of 315 samples used, 0 more than once, 0 not used",
        "epoch 2: 315 of 315 samples used, 0 more than once, 0 not used",
        "4 starts: every epoch is correct",
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_loader_workers(tmp_path, one_rank, workers):
    train(tmp_path / "out", 2, f"data.num_workers={workers}")
    assert_equal(one_rank, tmp_path / "out")


@pytest.mark.parametrize("more", [["precision=bf16"], ["data.drop_last=true", "optim.name=adamw"]])
def test_other_settings(tmp_path, more):
    settings = ["train.epochs=1", *more]
    train(tmp_path / "one", 1, *settings)
    train(tmp_path / "four", 4, *settings)
    assert_equal(tmp_path / "one", tmp_path / "four")


def test_mixed_images(tmp_path):
    """The partner of an image is drawn by its key: another rank's image, and with workers another process loads it."""
    mixing = ["train.max_steps=12", "train.epochs=1", "data.mixup=0.4", "data.cutmix=1"]
    train(tmp_path / "one", 1, *mixing)
    train(tmp_path / "two", 2, *mixing, "data.num_workers=2")
    train(tmp_path / "four", 4, *mixing, die_at=7)
    train(tmp_path / "four", 4, *mixing)
    assert_equal(tmp_path / "one", tmp_path / "two")
    assert_equal(tmp_path / "one", tmp_path / "four")
    train(tmp_path / "without", 1, *mixing[:2])
    assert differences(result(tmp_path / "one")[0]["model"], result(tmp_path / "without")[0]["model"])


def test_dropout(tmp_path):
    """Dropout masks depend on the virtual shard, not on the rank that computes it, nor on restarts."""
    settings = ["train.epochs=1", "data.size=32"]  # a task that defines its network gets images as they are
    train(tmp_path / "one", 1, *settings, program="dropout_program.py")
    train(tmp_path / "two", 2, *settings, program="dropout_program.py", die_at=9)
    train(tmp_path / "two", 2, *settings, program="dropout_program.py")
    assert_equal(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "without", 1, *settings)
    assert differences(result(tmp_path / "one")[0]["model"], result(tmp_path / "without")[0]["model"])


def test_plain_ddp_is_not_exact(tmp_path):
    """The control experiment: if it fails, the other tests may pass for another reason."""
    for ranks in (1, 2):
        train(tmp_path / f"{ranks}", ranks, "distributed.reduction=ddp")
    assert differences(result(tmp_path / "1")[0]["model"], result(tmp_path / "2")[0]["model"])


DIVERGE = """
import os, sys, torch
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.training.trainer import Trainer
class Diverging(Trainer):
    def step(self, batch):
        result = super().step(batch)
        if self.env.rank == 1 and self.state.step == 10:
            with torch.no_grad():
                self.model.fc2.weight[3, 5] += 1e-7
        return result
run_entry(lambda: train.main(trainer_class=Diverging))
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_different_replica_stops_the_run_and_is_named(tmp_path, ranks):
    script = tmp_path / "diverge.py"
    script.write_text(DIVERGE)
    ended = run_ranks(ranks, script, *SETTINGS, "distributed.reduction=ddp", f"run.dir={tmp_path}", "run.name=run")
    assert ended.status != 0
    # With two ranks there is no majority; the lower value counts as the common one.
    match = re.search(r"ReplicaMismatch: ranks hold different parameters .*: rank (\d): ([\w.]+)", ended.stderr)
    assert match, str(ended)
    assert match[2] == "fc2.weight" or ranks == 2
    if ranks == 4:
        assert match[1] == "1"
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    assert torch.load(newest, weights_only=True)["step"] <= 14  # the check after step 14 stopped the run
