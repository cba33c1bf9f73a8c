"""Ranks of one machine sum gradients in shared memory: the same bits as Gloo, and no rank waits forever."""

import os
import re
import signal
import sys

import pytest
from conftest import Job
from forked import run_ranks
from test_failures import newest_weights

from distlenet.prove.processes import free_port

pytestmark = pytest.mark.ranks

SETTINGS = ("data.name=digits", "device=cpu", "train.global_batch_size=64", "run.name=run")

HIDDEN = """
import os
from distlenet import train
from distlenet.utils.mapped_file import FileRef
from distlenet.distributed.entry_point import run_entry
original = FileRef.map
def hidden(self, shared=False):
    if shared and os.environ["RANK"] == "1":
        raise FileNotFoundError("hidden by the test")
    return original(self, shared)
FileRef.map = hidden
run_entry(train.main)
"""


def test_ranks_without_shared_memory_warn_and_train_the_same_weights(tmp_path):
    """The sum of two numbers does not depend on their order, so the weights of two ranks are bit-identical."""
    script = tmp_path / "hidden.py"
    script.write_text(HIDDEN)
    settings = (*SETTINGS, "train.epochs=2")
    run_ranks(2, "-m", "distlenet.train", *settings, f"run.dir={tmp_path / 'shared'}").succeeded()
    ended = run_ranks(2, script, *settings, f"run.dir={tmp_path / 'hidden'}").succeeded()
    assert (
        ended.stderr.count("distlenet: distributed.shared_memory=auto: rank 1 cannot share memory (hidden by the test)")
        == 1
    ), str(ended)
    off = (*settings, "distributed.shared_memory=off", f"run.dir={tmp_path / 'off'}")
    assert "shared_memory" not in run_ranks(2, "-m", "distlenet.train", *off).succeeded().stderr
    shared, hidden, gloo = (newest_weights(tmp_path / name / "run") for name in ("shared", "hidden", "off"))
    assert all((a == b).all() for a, b in zip(shared, gloo, strict=True))
    assert all((a == b).all() for a, b in zip(hidden, gloo, strict=True))


def test_killed_rank_ends_the_others_without_a_launcher(tmp_path):
    """Without torchrun, as under srun: the remaining rank must detect the failure by itself."""
    command = (sys.executable, "-m", "distlenet.train", *SETTINGS, "train.epochs=1000", "train.log_every=50")
    jobs, port = [], free_port()
    for rank in range(2):
        ranks_env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {name: str(value) for name, value in ranks_env.items()} | {"MASTER_ADDR": "127.0.0.1"}
        jobs.append(Job(tmp_path, *command, f"run.dir={tmp_path}", env=env))
    with jobs[0] as first, jobs[1] as second:
        first.wait_for_records(2)
        os.kill(second.process.pid, signal.SIGKILL)
        ended = first.wait()
    assert ended.status == 1, str(ended)
    # Usually it waits in shared memory; during the collective of a record, Gloo reports the failure.
    assert re.search("rank 1: remote process exited|closed by peer|reset by peer|Broken pipe", ended.stdout), str(ended)
    assert "another rank has exited without a report" in ended.stdout
