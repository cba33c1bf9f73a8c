import contextlib
import os
import signal
import sys
from contextlib import closing

import pytest
from conftest import run_command

from distlenet.distributed.preemption import SIGNALS, Preemption
from distlenet.utils.startup import signal_name

pytestmark = pytest.mark.unit


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_and_the_second_has_no_effect(clock, number):
    before = signal.getsignal(number)
    with closing(Preemption(grace_s=25)) as preemption:
        preemption.install()
        assert not preemption.stop_requested
        os.kill(os.getpid(), number)
        clock[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 3.5
        assert preemption.stop_requested
        assert preemption.requested_by == signal_name(number)
        assert preemption.seconds_left() == 21.0
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("python_handles_ctrl_c")
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])  # SIGTERM: torchrun sends it to its ranks then
def test_a_second_ctrl_c_interrupts(clock, monkeypatch, second):
    """The first one may arrive twice: from the terminal and from a wrapper that forwards it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with closing(Preemption(grace_s=25)) as preemption:
        preemption.install()
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_without_torchrun_sigterm_is_not_a_second_ctrl_c(clock, monkeypatch):
    """A scheduler sends it: the save that the first Ctrl-C requested continues."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with closing(Preemption(grace_s=25)) as preemption:
        preemption.install()
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested_by == signal_name(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_that_ignores_ctrl_c_continues_to_ignore_it(monkeypatch):
    monkeypatch.setattr("distlenet.distributed.preemption.SIGNALS", (signal.SIGINT,))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with closing(Preemption(grace_s=25)) as preemption:
            preemption.install()
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.stop_requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_rank_without_a_signal_has_the_whole_grace_period():
    assert Preemption(grace_s=25).seconds_left() == 25


WORKERS = """
import os, subprocess, torch
from torch.utils.data import default_collate
from distlenet.data import loader
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.data.sources import ImageDataset
from distlenet.distributed.preemption import Preemption, worker_init_fn

signals_sent, send = os.pipe()
def late(worker):  # the second worker is still starting when the signals arrive
    os.close(send)  # if the rank fails, the read ends
    if worker == 1:
        os.read(signals_sent, 1)
    worker_init_fn(worker)
loader.worker_init_fn = late
dataset = ImageDataset(torch.zeros(64, 1, 1, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8))
sampler = GlobalBatchSampler(dataset, 4, rank=0, world_size=1, seed=0, drop_last=False, virtual_shards=None)
preemption = Preemption(25)
preemption.install()
batches = loader.Loader(dataset, sampler, 2, torch.device("cpu"), default_collate, False).epoch(0)
samples = len(next(batches))
# As SLURM does: to all processes of the job, except the shell that sends them.
subprocess.run("trap '' TERM USR2 INT; kill -TERM 0; kill -USR2 0; kill -INT 0", shell=True, check=True)
os.write(send, b"!")
print(samples + sum(len(batch) for batch in batches), preemption.stop_requested)
"""


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_loader_workers_ignore_the_signals_from_the_start_and_exit_with_their_rank():
    """``batches`` still exists when Python exits, as after an error: Python then ends the workers by SIGTERM."""
    assert run_command(sys.executable, "-c", WORKERS).succeeded().stdout == "64 True\n"


def test_handlers_of_many_requests_can_follow_each_other():
    """signal.signal formats the previous handler: its text must not contain all handlers before it, twice each."""
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            preemption = stack.enter_context(contextlib.closing(Preemption(grace_s=25)))
            preemption.install()
        assert len(repr(preemption.handle_signal)) < 1000
