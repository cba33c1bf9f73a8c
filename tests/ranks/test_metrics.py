"""Validation, early stopping, and metrics over all predictions, on several ranks."""

import json
from pathlib import Path

import pytest
import torch
from forked import run_python, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]

DIRECTORY = Path(__file__).parent
SETTINGS = (
    "device=cpu",
    "data.name=digits",
    "data.validation=0.2",
    "distributed.reduction=exact",
    "distributed.virtual_shards=8",
    "train.global_batch_size=256",
    "train.epochs=2",
    "checkpoint.best_by=val/auc",
    "run.name=run",
)
TASK = "task.name=ranking_task:Ranking"


def results(path: Path) -> dict:
    summary = json.loads((path / "run/summary.json").read_text())
    return {name: value for name, value in summary.items() if name.startswith(("val_", "test_", "best_"))}


def test_metrics_over_all_predictions_do_not_depend_on_ranks(tmp_path):
    for ranks in (1, 2, 4):
        words = ("-m", "distlenet.train", *SETTINGS, TASK, f"run.dir={tmp_path / str(ranks)}")
        run_ranks(ranks, *words, cwd=DIRECTORY).succeeded()
    wanted = results(tmp_path / "1")
    assert {"val_auc", "test_auc", "val_ordered_sum", "test_accuracy", "best_value"} <= wanted.keys()
    assert (wanted["val_count"], wanted["test_count"]) == (287, 360)
    assert results(tmp_path / "2") == results(tmp_path / "4") == wanted
    for split, ranks in (("test", 3), ("val", 3), ("test", 2)):
        words = ("-m", "distlenet.evaluate", f"checkpoint={tmp_path / '4/run'}", TASK, "--json", "--split", split)
        evaluated = json.loads(run_ranks(ranks, *words, cwd=DIRECTORY).succeeded().stdout)
        values = {name: value for name, value in evaluated.items() if name.startswith(f"{split}_")}
        assert values == {name: value for name, value in wanted.items() if name.startswith(f"{split}_")}


STOPPING = (
    "device=cpu",
    "data.name=digits",
    "data.validation=0.2",
    "train.global_batch_size=256",
    "train.epochs=9",
    "optim.lr=1e-9",  # the accuracy stays the same
    "train.stop_when=val/accuracy",
    "train.stop_patience=2",
    "checkpoint.every_steps=1",
)


def test_stop_after_any_step_does_not_change_an_early_end(tmp_path):
    ended = run_python(DIRECTORY / "every_stop.py", tmp_path, *STOPPING, timeout=500).succeeded()
    assert ended.stdout == "14 stops, all equal\n"  # of 3 epochs with 5 steps


def test_kill_between_an_evaluation_and_its_checkpoint_counts_it_once(tmp_path):
    words = (*STOPPING, "run.name=run", f"run.dir={tmp_path}")
    for _ in range(2):
        died = run_ranks(2, DIRECTORY / "rank_program.py", tmp_path, "--die-after-records", *words)
        assert died.status != 0, str(died)
    run_ranks(2, DIRECTORY / "rank_program.py", tmp_path, *words).succeeded()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["stopped_early"]) == (15, True)
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert state["best"]["val/accuracy"]["stale"] == 2
