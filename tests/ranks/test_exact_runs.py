"""The promise: the same bits on any number of ranks, and after any number of stops at any step."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command, run_torchrun
from every_stop import differences, result

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

HERE = Path(__file__).parent

# 315 images in batches of 16 make 20 steps an epoch, the last of 11 images; 8 shards share those unevenly.
SETTINGS = (
    "device=cpu",
    "distributed.reduction=exact",
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


@pytest.mark.parametrize("more", [["precision=fp32"], ["precision=bf16", "optim.name=adamw", "data.num_workers=1"]])
def test_a_stop_after_any_step_changes_nothing(tmp_path, more):
    steps = ["train.max_steps=12", "train.epochs=1"] if "data.num_workers=1" in more else []
    ended = run_command(
        sys.executable, HERE / "every_stop.py", tmp_path, *SETTINGS, *more, *steps, timeout=500
    ).succeeded()
    assert ended.stdout == ("11 stops, all equal\n" if steps else "39 stops, all equal\n")


def train(out: Path, ranks: int, *more: str, die_at: int | None = None, program: str = "rank_program.py"):
    """Train to the end, or to a death, in ``out``."""
    out.mkdir(exist_ok=True)
    death = ("--die-at", die_at) if die_at is not None else ()
    ended = run_torchrun(ranks, HERE / program, out, *death, *SETTINGS, f"run.dir={out}", "run.name=run", *more)
    assert (ended.status == 0) == (die_at is None), str(ended)
    return ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "alone"
    train(out, 1)
    return out


def assert_equal(a: Path, b: Path) -> None:
    """The final checkpoint and the whole history are equal, and the summary where it does not speak of ranks."""
    assert differences(list(result(a)), list(result(b))) == []
    summaries = [json.loads((out / "run/summary.json").read_text()) for out in (a, b)]
    for key in ("test_loss", "test_accuracy", "test_count", "steps", "epochs"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks(tmp_path, alone, ranks):
    train(tmp_path / "out", ranks)
    assert_equal(alone, tmp_path / "out")


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_with_unequal_shares(tmp_path, alone, ranks):
    """8 shards on 3 ranks are 3 + 3 + 2; on 5 ranks some have one."""
    train(tmp_path / "out", ranks, "distributed.allow_uneven_batches=true")
    assert_equal(alone, tmp_path / "out")


def test_restarts_on_other_numbers_of_ranks_and_the_ledger_of_them(tmp_path, alone):
    out = tmp_path / "out"
    ledger = "data.ledger=true"
    # Checkpoints every third step: what the dying ranks did beyond the last one is lost, and done again.
    seldom = "checkpoint.every_steps=3"
    train(out, 1, ledger, seldom, die_at=7)
    train(out, 2, ledger, seldom, die_at=20)
    train(out, 4, ledger, seldom, die_at=29)
    ended = train(out, 1, ledger, seldom)
    assert "resumed at step 27 of 40" in ended.stdout
    assert_equal(alone, out)
    told = run_command(sys.executable, "-m", "distlenet.ledger", out / "run").succeeded().stdout.splitlines()
    assert told == [
        "epoch 1: 315 of 315 samples used, 0 more than once",
        "epoch 2: 315 of 315 samples used, 0 more than once",
        "4 starts: every epoch is correct",
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_loader_workers(tmp_path, alone, workers):
    train(tmp_path / "out", 2, f"data.num_workers={workers}")
    assert_equal(alone, tmp_path / "out")


@pytest.mark.parametrize("more", [["precision=bf16"], ["data.drop_last=true", "optim.name=adamw"]])
def test_other_settings_too(tmp_path, more):
    short = ["train.epochs=1", *more]
    train(tmp_path / "one", 1, *short)
    train(tmp_path / "four", 4, *short)
    assert_equal(tmp_path / "one", tmp_path / "four")


def test_a_net_that_draws_random_numbers(tmp_path):
    """Dropout masks belong to the virtual shard, not to the rank that computes it, nor to a restart."""
    once = ["train.epochs=1"]
    train(tmp_path / "one", 1, *once, program="dropout_program.py")
    train(tmp_path / "two", 2, *once, program="dropout_program.py", die_at=9)
    train(tmp_path / "two", 2, *once, program="dropout_program.py")
    assert_equal(tmp_path / "one", tmp_path / "two")
    train(tmp_path / "without", 1, *once)
    assert differences(result(tmp_path / "one")[0]["model"], result(tmp_path / "without")[0]["model"])


def test_plain_ddp_is_not_exact(tmp_path):
    """What this is for. If it ever fails, the other tests may be passing for another reason."""
    for ranks in (1, 2):
        train(tmp_path / f"{ranks}", ranks, "distributed.reduction=ddp")
    assert differences(result(tmp_path / "1")[0]["model"], result(tmp_path / "2")[0]["model"])


DIVERGE = """
import os, sys, torch
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.training.trainer import Trainer
class Diverging(Trainer):
    def train_step(self, *batch):
        super().train_step(*batch)
        if self.env.rank == 1 and self.at.step == 10:
            with torch.no_grad():
                self.net.fc2.weight[3, 5] += 1e-7
train.Trainer = Diverging
run_entry(train.main)
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_replica_that_differs_stops_the_run_and_is_named(tmp_path, ranks):
    script = tmp_path / "diverge.py"
    script.write_text(DIVERGE)
    ended = run_torchrun(ranks, script, *SETTINGS, "distributed.reduction=ddp", f"run.dir={tmp_path}", "run.name=run")
    assert ended.status != 0
    # Of two ranks that differ none is the odd one out; the lower value counts as common.
    told = re.search(r"ReplicasDiffer: ranks hold different parameters .*: rank (\d): ([\w.]+)", ended.stderr)
    assert told, str(ended)
    assert told[2] == "fc2.weight" or ranks == 2
    if ranks == 4:
        assert told[1] == "1"
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*.pt"))[-1]
    assert torch.load(newest, weights_only=True)["step"] <= 14  # the check after step 14 found it
