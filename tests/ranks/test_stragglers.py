"""A rank that computes more slowly than the others is reported."""

import json
import socket

import pytest
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = """
import os, time
from distlenet import train
from distlenet.distributed.entry_point import run_entry
from distlenet.tasks.image_classification import ImageClassification
class Slow(ImageClassification):
    def transform(self, data, keys):
        if keys is not None:  # training
            time.sleep(0.3 if os.environ["RANK"] == "2" else 0.1)
        return super().transform(data, keys)
run_entry(lambda: train.main(Slow))
"""


def test_a_slow_rank_is_reported(tmp_path):
    """Others may be, too, on a busy machine; tests/unit/test_console.py tests the limits of the report."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = ("data.name=digits", "train.epochs=2", "train.log_every=3", f"run.dir={tmp_path}", "run.name=run")
    ended = run_ranks(4, program, *settings).succeeded()
    lines = [line for line in ended.stdout.splitlines() if "longer than the median" in line]
    assert any(line.startswith(f"rank 2 on {socket.gethostname()} computes ") for line in lines), str(ended)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    assert sum(record["slowest_rank"] == 2 for record in train) > len(train) / 2
