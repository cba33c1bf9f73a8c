"""Ranks of one machine add gradients in memory that they share: to the same bits as Gloo; none waits for ever."""

import os
import re
import signal
import socket
import sys

import pytest
from conftest import Job, run_torchrun
from test_failures import newest_weights

pytestmark = pytest.mark.ranks

SETTINGS = ("data.name=digits", "device=cpu", "train.global_batch_size=64", "run.name=run")

HIDDEN = """
import os
from distlenet import train
from distlenet.utils.mapped_file import Place
from distlenet.distributed.entry_point import run_entry
seen = Place.map
def hidden(self, shared=False):
    if shared and os.environ["RANK"] == "1":
        raise FileNotFoundError("not to be seen")
    return seen(self, shared)
Place.map = hidden
run_entry(train.main)
"""


def test_two_ranks_that_cannot_share_memory_say_so_and_learn_the_same(tmp_path):
    """Of two numbers the sum is the same in either order: so the weights are equal to the bit."""
    script = tmp_path / "hidden.py"
    script.write_text(HIDDEN)
    words = (*SETTINGS, "train.epochs=2")
    run_torchrun(2, "-m", "distlenet.train", *words, f"run.dir={tmp_path / 'shared'}").succeeded()
    ended = run_torchrun(2, script, *words, f"run.dir={tmp_path / 'hidden'}").succeeded()
    assert (
        ended.stderr.count("distlenet: distributed.shared_memory=auto: rank 1 cannot share memory (not to be seen)")
        == 1
    ), str(ended)
    off = (*words, "distributed.shared_memory=off", f"run.dir={tmp_path / 'off'}")
    assert "shared_memory" not in run_torchrun(2, "-m", "distlenet.train", *off).succeeded().stderr
    shared, hidden, gloo = (newest_weights(tmp_path / name / "run") for name in ("shared", "hidden", "off"))
    assert all((a == b).all() for a, b in zip(shared, gloo, strict=True))
    assert all((a == b).all() for a, b in zip(hidden, gloo, strict=True))


def test_ranks_that_nobody_ends_end_when_one_is_killed(tmp_path):
    """Without torchrun, as under srun: the rank that is left must find out by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (sys.executable, "-m", "distlenet.train", *SETTINGS, "train.epochs=1000", "train.log_every=50")
    jobs = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        jobs.append(Job(tmp_path, *words, f"run.dir={tmp_path}", env=env))
    with jobs[0] as first, jobs[1] as second:
        first.wait_for_records(2)
        os.kill(second.process.pid, signal.SIGKILL)
        ended = first.wait(timeout=30)
    assert ended.status == 1, str(ended)
    # Nearly always it waits for a gradient; where the kill falls into a record's few numbers, Gloo says it.
    assert re.search("rank 1: remote process exited|closed by peer|reset by peer", ended.stdout), str(ended)
    assert "another rank has gone without a word" in ended.stdout
