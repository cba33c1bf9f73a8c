import json
import os
from pathlib import Path

import pytest

from distlenet import train
from distlenet.config.loading import load_config

pytestmark = pytest.mark.unit


def train_digits(tmp_path, *more):
    """Train two steps on the bundled digits, in ``tmp_path/run``."""
    settings = ("data.name=digits", "device=cpu", "train.max_steps=2", "run.name=run", f"run.dir={tmp_path}", *more)
    return train.train(load_config([], settings))


def test_final_evaluation_writes_its_error_analysis(tmp_path):
    summary = train_digits(tmp_path)
    report = json.loads((tmp_path / "run/test.json").read_text())
    assert report["classes"] == list("0123456789")
    assert sum(map(sum, report["confusion"])) == summary["test_count"] == 360
    correct = sum(report["confusion"][digit][digit] for digit in range(10))
    assert correct / 360 == pytest.approx(summary["test_accuracy"])
    assert all(mistake["label"] != mistake["predicted"] for mistake in report["mistakes"])
    assert len(report["mistakes"]) == min(24, 360 - correct)


def test_error_analysis_that_cannot_be_written_does_not_fail_the_run(tmp_path, capsys):
    (tmp_path / "run/test.json").mkdir(parents=True)  # no file can replace it
    assert train_digits(tmp_path)["steps"] == 2
    assert "test.json: cannot be written: Is a directory; the report has no confusion matrix" in capsys.readouterr().err


def test_a_run_leaves_no_file_of_its_directory_open(tmp_path):
    train_digits(tmp_path, "data.ledger=true")
    links = [path for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    assert not [link for link in links if os.readlink(link).startswith(str(tmp_path))]
