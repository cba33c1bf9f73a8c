import os
import signal
import sys

import pytest
import torch
from conftest import run_command

from distlenet import preemption
from distlenet.preemption import Heard, listening

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_remembered_and_the_second_changes_nothing(monkeypatch, number):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(clock))
    before = signal.getsignal(number)
    with listening(grace_s=25) as asked:
        asked.listen()
        assert not asked.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.asked
        assert asked.asked_by == signal.Signals(number).name
        assert asked.seconds_left() == 21.0
    assert signal.getsignal(number) == before


def test_who_was_not_asked_itself_has_all_of_the_time():
    with listening(grace_s=25) as asked:
        assert asked.seconds_left() == 25


def test_any_rank_that_was_asked_is_heard():
    heard = Heard(torch.device("cpu"))
    heard.put(torch.tensor(0.0))
    assert not heard.yes
    heard.put(torch.tensor(0.25))
    heard.put(torch.tensor(0.0))
    assert heard.yes


WORKER = """
import os, signal, torch
from torch.utils.data import DataLoader
from distlenet.preemption import begin_worker, listening
with listening(25) as asked:
    asked.listen()
    loader = iter(DataLoader(list(range(64)), num_workers=2, batch_size=4, worker_init_fn=begin_worker))
    next(loader)
    os.killpg(0, signal.SIGTERM)  # as torchrun and SLURM do: to the whole group
    os.killpg(0, signal.SIGUSR2)
    print(sum(len(batch) for batch in loader), asked.asked_by)
"""


def test_a_loaders_workers_ignore_the_signals():
    assert run_command(sys.executable, "-c", WORKER).succeeded().stdout == "60 SIGTERM\n"
