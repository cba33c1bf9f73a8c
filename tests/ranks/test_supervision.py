"""What a supervisor and a profiler get from a training of two ranks."""

import os
import signal
import sys

import pytest
from conftest import Job
from forked import run_python

pytestmark = pytest.mark.ranks

LAUNCH = (sys.executable, "-m", "distlenet.launch", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train")
SETTINGS = ("device=cpu", "data.name=digits", "train.global_batch_size=64", "train.epochs=5000", "run.name=run")


def test_heartbeats_and_the_traces_of_all_ranks(tmp_path):
    heartbeat, profile = tmp_path / "heartbeat", tmp_path / "run/profile"
    settings = (f"distributed.heartbeat_file={heartbeat}", "train.profile_steps=2:4", "train.profile_all_ranks=true")
    with Job(tmp_path, *LAUNCH, *SETTINGS, *settings, f"run.dir={tmp_path}") as job:
        traces = [profile / f"steps-2-3.rank-{rank}.pt.trace.json.gz" for rank in (0, 1)]
        job.wait_until(lambda: all(trace.exists() for trace in traces), "the traces")
        job.wait_until(heartbeat.exists, "the heartbeat file")
        os.utime(heartbeat, times=(0, 0))
        job.wait_until(lambda: heartbeat.stat().st_mtime > 0, "the next heartbeat")
        job.process.send_signal(signal.SIGTERM)
        job.wait()
    assert not heartbeat.exists()
    heartbeat.mkdir()  # an evaluation, which has the settings of the checkpoint, does not use the file
    run_python("-m", "distlenet.evaluate", f"checkpoint={tmp_path / 'run'}").succeeded()
