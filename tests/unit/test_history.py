"""The files that a run writes about itself."""

import json

import pytest

from distlenet.tracking.base import Trackers
from distlenet.tracking.history import History
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SUMMARY = {"test_accuracy": 0.98765, "test_count": 360, "steps": 40, "run_dir": "runs/x"}
SUMMARY |= {"start_s": 2.31, "wall_s": 20.0, "train_images_per_s": 12345.6}


def record(step: int, split: str = "train") -> dict:
    return {"split": split, "step": step, "epoch": 1, "batch": step, "loss": 0.5, "accuracy": 0.75, "count": 64}


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write(run_dir, steps, start=0):
    """Write records of a run that resumes from step ``start``."""
    history = History(run_dir, "seed: 0\n")
    history.start({"step": start, "evaluated": start, "complete": start == 40})
    for step in steps:
        history.log(record(step))
    return history


def test_each_record_is_a_line_immediately(tmp_path):
    history = write(tmp_path, [1, 2])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]  # not closed: a kill loses nothing
    history.finish(SUMMARY)
    history.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_resuming_removes_records_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4]).close()
    write(tmp_path, [3, 4, 5], start=2).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_resuming_removes_an_evaluation_that_no_checkpoint_includes(tmp_path):
    history = write(tmp_path, [19, 20])
    history.log(record(20, "test"))
    history.close()
    again = History(tmp_path, "")
    again.start({"step": 20, "evaluated": 0, "complete": False})
    again.close()
    assert [(line["split"], line["step"]) for line in lines(tmp_path)] == [("train", 19), ("train", 20)]


def test_an_incomplete_last_line_is_removed(tmp_path):
    write(tmp_path, [1, 2]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    write(tmp_path, [3], start=2).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["", "{}", "3", '{"step": "x"}', "garbled"])
def test_an_invalid_line_is_an_error(tmp_path, line):
    write(tmp_path, [1]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not a record"):
        write(tmp_path, [], start=1)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    history = write(tmp_path, [])
    history.log({**record(1), "loss": float("nan"), "lr": float("inf")})
    history.finish({**SUMMARY, "test_loss": float("-inf")})
    history.close()
    (line,) = lines(tmp_path)
    assert (line["loss"], line["lr"], line["step"]) == (None, None, 1)
    assert json.loads((tmp_path / "summary.json").read_text())["test_loss"] is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_files_that_cannot_be_written_are_an_error(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"run directory {tmp_path}: cannot be written"):
        write(tmp_path, [1])


def test_the_settings_are_written_at_the_start(tmp_path):
    history = History(tmp_path, "seed: 5\n")
    assert not (tmp_path / "config.yaml").exists()
    history.start({"step": 0, "evaluated": 0, "complete": False})
    history.sync()
    history.close()
    assert (tmp_path / "config.yaml").read_text() == "seed: 5\n"


def test_a_start_at_step_0_removes_all_records(tmp_path):
    write(tmp_path, [1, 2]).close()
    write(tmp_path, [], start=0).close()
    assert lines(tmp_path) == []


def test_a_complete_run_keeps_its_summary(tmp_path):
    for measured in (1234.5, None):
        history = write(tmp_path, [], start=0 if measured else 40)
        history.finish({**SUMMARY, "train_images_per_s": measured})
    assert json.loads((tmp_path / "summary.json").read_text())["train_images_per_s"] == 1234.5


def test_trackers_call_each_tracker(tmp_path):
    Trackers().log(record(1))
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    both = Trackers([History(directory, "") for directory in directories])
    both.start({"step": 0, "evaluated": 0, "complete": False})
    both.log(record(1))
    both.sync()
    both.finish(SUMMARY)
    both.close()
    for directory in directories:
        assert lines(directory) == [record(1)]
        assert (directory / "summary.json").exists()
