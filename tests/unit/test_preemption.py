import os
import signal
import sys

import pytest
import torch
from conftest import run_command

from distlenet.distributed import preemption
from distlenet.distributed.preemption import StopFlag, handle_preemption

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_remembered_and_the_second_changes_nothing(monkeypatch, number):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(clock))
    before = signal.getsignal(number)
    with handle_preemption(preemption_grace_s=25) as asked:
        asked.listen()
        assert not asked.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.asked
        assert asked.asked_by == signal.Signals(number).name
        assert asked.seconds_left() == 21.0
    assert signal.getsignal(number) == before


def test_who_was_not_asked_itself_has_all_of_the_time():
    with handle_preemption(preemption_grace_s=25) as asked:
        assert asked.seconds_left() == 25


def test_any_rank_that_was_asked_is_heard():
    heard = StopFlag(torch.device("cpu"))
    heard.put(torch.tensor(0.0))
    assert not heard.yes
    heard.put(torch.tensor(0.25))
    heard.put(torch.tensor(0.0))
    assert heard.yes


WORKERS = """
import os, subprocess, torch
from distlenet.data import loader
from distlenet.data.sources import Split
from distlenet.distributed.preemption import worker_init_fn, handle_preemption
signals_sent, told = os.pipe()
def late(worker):  # the second worker is still being made when the signals come
    if worker == 1:
        os.read(signals_sent, 1)
    worker_init_fn(worker)
loader.worker_init_fn = late
split = Split(torch.zeros(64, 1, 1, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8))
with handle_preemption(25) as asked:
    asked.listen()
    batches = iter(loader.Loader(split, torch.arange(64).split(4), 2, torch.device("cpu")))
    next(batches)
    # As SLURM does: to all processes of the job. The shell that sends them stays out of it.
    subprocess.run("trap '' TERM USR2; kill -TERM 0; kill -USR2 0", shell=True, check=True)
    os.write(told, b"!")
    print(sum(len(labels) for _, labels, _ in batches), asked.asked)
"""


def test_a_loaders_workers_ignore_the_signals_from_their_first_moment_and_end_with_their_rank():
    """``batches`` is still there when Python leaves, as after an error: then it ends the workers by SIGTERM."""
    assert run_command(sys.executable, "-c", WORKERS, timeout=60).succeeded().stdout == "60 True\n"
