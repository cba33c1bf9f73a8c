"""A rank that computes more slowly than the others is named."""

import json
import socket
import sys

import pytest
from conftest import run_command

pytestmark = pytest.mark.ranks

PROGRAM = """
import os, time
from distlenet import train
from distlenet.data import augment
from distlenet.distributed.entry_point import run_entry
whole = augment.Prepare.augmented
def slowed(self, *batch):
    time.sleep(0.1 * (1.3 if os.environ["RANK"] == "2" else 1.0))  # what the others compute, and 30 % more of it
    return whole(self, *batch)
augment.Prepare.augmented = slowed
run_entry(train.main)
"""


def test_a_rank_slowed_by_30_percent_is_named(tmp_path):
    """Four ranks on two cores compute some 10 ms a step each; the sleeps make it 110, and of one 30 more."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4")
    words = ("data.name=digits", "train.epochs=3", "train.log_every=3", f"run.dir={tmp_path}", "run.name=run")
    ended = run_command(*launcher, program, *words).succeeded()
    told = [line for line in ended.stdout.splitlines() if "longer than the median" in line]
    assert len(told) == 1, str(ended)
    assert told[0].startswith(f"rank 2 on {socket.gethostname()} computes ")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["split"] == "train"]
    assert sum(record["slowest_rank"] == 2 for record in train) > 0.8 * len(train)
