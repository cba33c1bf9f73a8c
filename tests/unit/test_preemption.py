import contextlib
import os
import signal
import sys
from contextlib import closing

import pytest
from conftest import run_command

from distlenet.distributed.preemption import SIGNALS, Preemption

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_and_the_second_has_no_effect(monkeypatch, number):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("distlenet.distributed.preemption.time.monotonic", lambda: next(clock))
    before = signal.getsignal(number)
    with closing(Preemption(grace_s=25)) as preemption:
        preemption.install()
        assert not preemption.stop_requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.stop_requested
        assert preemption.requested_by == signal.Signals(number).name
        assert preemption.seconds_left() == 21.0
    assert signal.getsignal(number) == before


def test_a_rank_without_a_signal_has_the_whole_grace_period():
    assert Preemption(grace_s=25).seconds_left() == 25


WORKERS = """
import os, subprocess, torch
from distlenet.data import loader
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.data.sources import ImageDataset
from distlenet.distributed.preemption import Preemption, worker_init_fn

signals_sent, send = os.pipe()
def late(worker):  # the second worker is still starting when the signals arrive
    if worker == 1:
        os.read(signals_sent, 1)
    worker_init_fn(worker)
loader.worker_init_fn = late
dataset = ImageDataset(torch.zeros(64, 1, 1, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8))
sampler = GlobalBatchSampler(dataset, 4, rank=0, world_size=1, seed=0)
preemption = Preemption(25)
preemption.install()
batches = loader.Loader(dataset, sampler, 2, torch.device("cpu")).epoch(0)
samples = len(next(batches))
# As SLURM does: to all processes of the job, except the shell that sends them.
subprocess.run("trap '' TERM USR2; kill -TERM 0; kill -USR2 0", shell=True, check=True)
os.write(send, b"!")
print(samples + sum(len(batch) for batch in batches), preemption.stop_requested)
"""


def test_loader_workers_ignore_the_signals_from_the_start_and_exit_with_their_rank():
    """``batches`` still exists when Python exits, as after an error: Python then ends the workers by SIGTERM."""
    assert run_command(sys.executable, "-c", WORKERS, timeout=60).succeeded().stdout == "64 True\n"


def test_handlers_of_many_requests_can_follow_each_other():
    """signal.signal formats the previous handler: its text must not contain all handlers before it, twice each."""
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            preemption = stack.enter_context(contextlib.closing(Preemption(grace_s=25)))
            preemption.install()
        assert len(repr(preemption.handle_signal)) < 1000
