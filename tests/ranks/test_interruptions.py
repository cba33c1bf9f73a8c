"""Killed ranks, and runs that resume."""

import json
from pathlib import Path

import pytest
import torch
from conftest import REPO, run_torchrun
from forked import run_python, run_ranks

from distlenet.tracking.base import NONDETERMINISTIC_KEYS

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("rank_program.py")
SETTINGS = (
    "device=cpu",
    "data.name=digits",
    "data.augment=shift",
    "train.global_batch_size=64",
    "train.epochs=2",
    "train.log_every=5",
    "checkpoint.every_steps=4",
    "run.name=run",
)


def history(directory: Path) -> list[dict]:
    records = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in NONDETERMINISTIC_KEYS} for record in records]


@pytest.mark.parametrize(("launch", "ranks", "die_at"), [(run_torchrun, 2, 7), (run_ranks, 4, 23), (run_ranks, 2, 30)])
def test_killed_rank_ends_the_job_and_the_next_job_resumes_to_the_same_bits(tmp_path, launch, ranks, die_at):
    """Within the first epoch, at the start of the second, and within it; an epoch has 23 steps."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        directory.mkdir()
    run_ranks(ranks, PROGRAM, whole, *SETTINGS, f"run.dir={whole}").succeeded()
    # The job ends before the watchdog ends it, and before the time limit of the command.
    words = ("--die-at", die_at, *SETTINGS, "distributed.step_timeout_s=600", f"run.dir={broken}")
    died = launch(ranks, PROGRAM, broken, *words)
    assert died.status != 0, str(died)
    assert not (broken / "run/summary.json").exists()
    resumed = run_ranks(ranks, PROGRAM, broken, *SETTINGS, f"run.dir={broken}").succeeded()
    resumed_at = die_at // 4 * 4 if die_at != 23 else 23  # the end of an epoch is saved as well
    assert f"resumed at step {resumed_at} of 46" in resumed.stdout, str(resumed)
    a, b = (torch.load(directory / "rank0.pt", weights_only=True) for directory in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert history(whole) == history(broken)


@pytest.mark.parametrize("every", [1, 23])
def test_kill_at_the_end_of_an_epoch_duplicates_no_record(tmp_path, every):
    settings = (*SETTINGS, f"run.dir={tmp_path}", f"checkpoint.every_steps={every}")
    died = run_ranks(2, PROGRAM, tmp_path, "--die-after-records", *settings)
    assert died.status != 0, str(died)
    assert history(tmp_path)[-1]["split"] == "test"
    run_ranks(2, PROGRAM, tmp_path, *settings).succeeded()
    records = [(record["split"], record["step"]) for record in history(tmp_path)]
    assert len(set(records)) == len(records)
    assert [step for split, step in records if split == "test"] == [23, 46]


def test_user_error_under_torchrun_is_one_line(tmp_path):
    ended = run_torchrun(3, "-m", "distlenet.train", "data.name=digits", "train.global_batch_size=64")
    assert ended.status != 0
    # A set: on a busy machine, the other ranks do not wait long enough for rank 0, and repeat the line.
    ours = {line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")}
    assert ours == {
        "distlenet: train.global_batch_size=64: is not divisible by 3 ranks × 1 accumulation steps; give 63 or 66 "
        "or distributed.allow_uneven_batches=true"
    }, str(ended)
    assert "UserError" not in ended.stderr, str(ended)


ERROR_ON_RANK_1 = """
import os, sys
from distlenet import train
from distlenet.data.sources import opening
from distlenet.distributed.entry_point import run_entry
from distlenet.utils.errors import UserError
def map_data(opened):
    if os.environ["RANK"] == "1":
        raise UserError("disk not readable")
    return original(opened)
original, opening.map_data = opening.map_data, map_data
run_entry(train.main)
"""


def test_error_on_one_rank_ends_the_job_and_names_the_rank(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(ERROR_ON_RANK_1)
    ended = run_ranks(2, script, "data.name=digits", f"run.dir={tmp_path}")
    assert ended.status != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")]
    assert ours == ["distlenet: rank 1: disk not readable"], str(ended)


ERROR_IN_A_BATCH_OF_RANK_1 = """
import os
from distlenet import train
from distlenet.data.sources import ImageDataset
from distlenet.distributed.entry_point import run_entry
from distlenet.utils.errors import UserError
def get_batch(self, indices):
    batches.append(indices)
    if os.environ["RANK"] == "1" and len(batches) == 5:
        raise UserError("sample 7: no label")
    return original(self, indices)
batches, original, ImageDataset.get_batch = [], ImageDataset.get_batch, get_batch
run_entry(train.main)
"""


def test_error_in_a_batch_of_one_rank_is_the_error_of_the_job(tmp_path):
    """The other rank loses its connection, and must not report that a rank was killed."""
    script = tmp_path / "program.py"
    script.write_text(ERROR_IN_A_BATCH_OF_RANK_1)
    ended = run_torchrun(2, script, "data.name=digits", f"run.dir={tmp_path}")
    assert ended.status != 0
    ours = [line for line in ended.stderr.splitlines() if line.startswith("distlenet: ")]
    assert ours == ["distlenet: sample 7: no label"], str(ended)


def test_complete_run_is_not_trained_again_and_evaluates_to_the_same_loss(tmp_path):
    words = ("-m", "distlenet.train", "--config", REPO / "configs/ci.yaml", "train.epochs=1", f"run.dir={tmp_path}")
    run_python(*words, "run.name=run").succeeded()
    summary = (tmp_path / "run/summary.json").read_bytes()
    again = run_python(*words, "run.name=run").succeeded()
    assert "this run is complete" in again.stdout
    assert (tmp_path / "run/summary.json").read_bytes() == summary
    results = {name: value for name, value in json.loads(summary).items() if name.startswith("test_")}
    assert results.keys() == {"test_loss", "test_accuracy", "test_count"}
    for ranks, path in ((1, "run"), (2, "run"), (4, "run/checkpoints/last.pt")):
        command = ("-m", "distlenet.evaluate", f"checkpoint={tmp_path / path}", "--json")
        evaluated = json.loads(run_ranks(ranks, *command).succeeded().stdout)
        assert {name: evaluated[name] for name in results} == results  # to the last bit
        assert evaluated["step"] == json.loads(summary)["steps"]
    shown = run_python("-m", "distlenet.evaluate", f"checkpoint={tmp_path / 'run'}").succeeded().stdout
    assert f"test loss {results['test_loss']:.4f}  test accuracy {results['test_accuracy']:.2%}" in shown
    assert shown.count("Accuracy of the network on the 360 test samples") == 1


def test_a_warning_of_an_evaluation_is_printed_once(tmp_path):
    settings = ("data.name=digits", "train.max_steps=1", f"run.dir={tmp_path}", "run.name=run")
    run_python("-m", "distlenet.train", *settings).succeeded()
    words = (f"checkpoint={tmp_path / 'run'}", "data.name=synthetic", "data.synthetic_test=20")
    evaluated = run_ranks(2, "-m", "distlenet.evaluate", *words).succeeded()
    assert evaluated.stderr.count("data.name=synthetic: the checkpoint was trained on digits") == 1, str(evaluated)
