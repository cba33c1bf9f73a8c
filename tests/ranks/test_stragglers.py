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
            time.sleep(0.1 * (1.3 if os.environ["RANK"] == "2" else 1.0))
        return super().transform(data, keys)
run_entry(lambda: train.main(Slow))
"""


def test_rank_slowed_by_30_percent_is_reported(tmp_path):
    """A step of four ranks on two cores takes 10 ms without the sleeps of 100 ms, or 130 ms on one rank."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = ("data.name=digits", "train.epochs=3", "train.log_every=3", f"run.dir={tmp_path}", "run.name=run")
    ended = run_ranks(4, program, *settings).succeeded()
    lines = [line for line in ended.stdout.splitlines() if "longer than the median" in line]
    assert len(lines) == 1, str(ended)
    assert lines[0].startswith(f"rank 2 on {socket.gethostname()} computes ")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    assert sum(record["slowest_rank"] == 2 for record in train) > 0.8 * len(train)
