import json
import sys
import time

import pytest
from conftest import run_command

from distlenet.training.meter import Metrics
from distlenet.training.starts import record_start, run_id
from distlenet.training.state import TrainState
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

BY_HAND: dict[str, str] = {}
BY_TORCHRUN = {"TORCHELASTIC_RESTART_COUNT": "1"}
BY_SLURM = {"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}


def test_progress_comes_back_as_it_was():
    progress = TrainState(step=7, epoch=1, batch=3, restarts=2, micro_batch=16, started_from="x.pt")
    assert progress.take_test(Metrics(0.5, 0.9, 360))
    again = TrainState()
    again.load_state_dict(json.loads(json.dumps(progress.state_dict())))
    assert again == progress
    assert again.evaluated == 7
    assert not again.take_test(Metrics(0.4, 0.8, 360))
    assert again.best_accuracy == 0.9
    assert again.test["test_accuracy"] == 0.8


@pytest.mark.parametrize("environ", [BY_TORCHRUN, BY_SLURM])
def test_restarts_in_vain_end(tmp_path, environ):
    record_start(tmp_path, 0, 2, 3, environ=BY_HAND)
    for _ in range(3):
        record_start(tmp_path, 40, 2, 3, environ=environ)
    with pytest.raises(UserError, match="restarted 3 times from step 40"):
        record_start(tmp_path, 40, 2, 3, environ=environ)
    record_start(tmp_path, 50, 2, 3, environ=environ)  # it has come on
    for _ in range(9):
        record_start(tmp_path, 50, 2, 3, environ=BY_HAND)  # a person may try as often as it takes
    record_start(tmp_path, 50, 2, 3, environ=environ)
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(lines) == 15
    assert lines[1]["step"] == 40
    assert lines[1]["world_size"] == 2
    assert lines[1]["automatic"]
    assert not lines[-2]["automatic"]


def test_a_line_that_a_power_cut_tore_stops_nobody(tmp_path):
    record_start(tmp_path, 7, 2, 1, environ=BY_HAND)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"step": 7, "autom\n')
    record_start(tmp_path, 7, 2, 1, environ=BY_TORCHRUN)
    with pytest.raises(UserError, match="restarted 1 times"):
        record_start(tmp_path, 7, 2, 1, environ=BY_TORCHRUN)


def test_a_start_that_left_no_checkpoint_is_gone_on_with_only_by_the_same_job(tmp_path):
    first = run_id(tmp_path, "", "a", environ=BY_HAND)
    record_start(tmp_path, 0, 2, 3, first, "a", environ=BY_HAND)
    assert run_id(tmp_path, "", "a", environ=BY_TORCHRUN) == first
    assert run_id(tmp_path, "", "b", environ=BY_TORCHRUN) != first  # the first attempt of a job that asks for more
    assert run_id(tmp_path, "", "a", environ=BY_HAND) != first  # after an edit of the network, perhaps
    assert run_id(tmp_path, "12345678", "a", environ=BY_HAND) == "12345678"
    record_start(tmp_path, 0, 2, 3, "23456789", "b", environ=BY_HAND)
    assert run_id(tmp_path, "", "a", environ=BY_TORCHRUN) != first  # another run began in between


def test_the_age_of_a_process_counts_from_its_start():
    """Field 22 of stat is in ticks of 10 ms, rounded down: at most one too many."""
    before = time.monotonic()
    ended = run_command(
        sys.executable, "-c", "from distlenet.training.starts import process_age_s; print(process_age_s())"
    )
    elapsed = time.monotonic() - before
    assert 0.1 < float(ended.succeeded().stdout) < elapsed + 0.01  # importing torch alone takes longer than 0.1 s
