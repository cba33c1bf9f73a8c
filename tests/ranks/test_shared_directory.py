"""Whether all hosts of a job see the run directory, and runs of hosts that do not."""

import json

import pytest
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = """
import sys
from pathlib import Path
import torch.distributed as dist
from distlenet.distributed.shared_directory import hosts_without

dist.init_process_group("gloo")
rank = dist.get_rank()
shared, separate = Path(sys.argv[1]), Path(sys.argv[1], str(min(rank, 1)))
print(rank, hosts_without(shared, rank, ["a", "b", "b"]), hosts_without(separate, rank, ["a", "b", "b"]))
print(rank, "one host:", hosts_without(separate, rank, ["a", "a", "a"]))
dist.destroy_process_group()
"""


def test_hosts_that_do_not_see_the_directory_of_rank_0(tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    lines = run_ranks(3, script, tmp_path).succeeded().stdout.splitlines()
    assert sorted(lines) == [
        "0 [] ['b']",
        "0 one host: []",
        "1 [] []",
        "1 one host: []",
        "2 [] []",
        "2 one host: []",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "program.py"]


SEPARATE = """
import json, os, sys
from pathlib import Path
from distlenet.config.loading import load_config
from distlenet.train import train
from distlenet.training.trainer import Trainer

directory = Path(sys.argv[1], os.environ["RANK"])
class RecordingTrainer(Trainer):
    def start(self):
        super().start()
        with (directory / "states").open("a") as file:
            file.write(json.dumps([self.state.run_id, self.state.restarts]) + "\\n")

words = [f"run.dir={directory}", "run.name=run", "data.name=digits", "device=cpu", "optim.schedule=constant"]
train(load_config([], words + sys.argv[2:]), trainer_class=RecordingTrainer)
"""


def test_ranks_without_a_shared_directory_have_the_same_id_and_number_of_restarts(tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    script = tmp_path / "program.py"
    script.write_text(SEPARATE)
    for steps in (1, 2):
        allowed = "checkpoint.allow_changed=[train.max_steps]"
        run_ranks(2, script, tmp_path, f"train.max_steps={steps}", allowed).succeeded()
    states = [[json.loads(line) for line in (tmp_path / name / "states").open()] for name in "01"]
    assert states[0] == states[1]
    assert [restarts for _, restarts in states[0]] == [0, 1]
    assert states[0][0][0] == states[0][1][0]
