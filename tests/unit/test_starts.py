import json
import sys
import time

import pytest
from conftest import run_command

from distlenet.training.starts import choose_run_id, count_starts, describe_restart, record_start
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

BY_HAND: dict[str, str] = {}
BY_TORCHRUN = {"TORCHELASTIC_RESTART_COUNT": "1"}
BY_SLURM = {"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}


def record(run_dir, step, limit, environ):
    record_start(run_dir, step, 2, limit, "12345678", "a", environ)


@pytest.mark.parametrize("environ", [BY_TORCHRUN, BY_SLURM])
def test_automatic_restarts_without_progress_are_limited(tmp_path, environ):
    record(tmp_path, 0, limit=3, environ=BY_HAND)
    for _ in range(3):
        record(tmp_path, 40, limit=3, environ=environ)
    with pytest.raises(UserError, match="restarted 3 times from step 40"):
        record(tmp_path, 40, limit=3, environ=environ)
    record(tmp_path, 50, limit=3, environ=environ)  # progress
    for _ in range(9):
        record(tmp_path, 50, limit=3, environ=BY_HAND)  # starts by hand are not limited
    record(tmp_path, 50, limit=3, environ=environ)
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 15
    assert (starts[1]["step"], starts[1]["world_size"]) == (40, 2)
    assert [start["automatic"] for start in starts] == [False] + 4 * [True] + 9 * [False] + [True]


@pytest.mark.parametrize("torn", ['{"step": 7, "autom\n', '{"step": 7, "autom', '{"step": 7}\n', "[]\n"])
def test_torn_line_is_ignored(tmp_path, torn):
    record(tmp_path, 7, limit=1, environ=BY_HAND)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write(torn)
    record(tmp_path, 7, limit=1, environ=BY_TORCHRUN)
    with pytest.raises(UserError, match="restarted 1 times"):
        record(tmp_path, 7, limit=1, environ=BY_TORCHRUN)


def test_run_id_without_checkpoint_is_kept_by_the_next_start_of_the_same_job(tmp_path):
    first = choose_run_id(tmp_path, "", "a", environ=BY_HAND)
    record_start(tmp_path, 0, 2, 3, first, "a", environ=BY_HAND)
    assert choose_run_id(tmp_path, "", "a", environ=BY_TORCHRUN) == first
    assert choose_run_id(tmp_path, "", "b", environ=BY_TORCHRUN) != first  # other settings
    assert choose_run_id(tmp_path, "", "a", environ=BY_HAND) == first
    assert choose_run_id(tmp_path, "", "b", environ=BY_HAND) != first
    assert choose_run_id(tmp_path, "12345678", "a", environ=BY_HAND) == "12345678"
    record_start(tmp_path, 0, 2, 3, "23456789", "b", environ=BY_HAND)
    assert choose_run_id(tmp_path, "", "a", environ=BY_TORCHRUN) != first  # another run started in between


def test_a_restart_is_described_and_counted(tmp_path):
    assert describe_restart(BY_HAND) == describe_restart({"TORCHELASTIC_RESTART_COUNT": "0"}) == ""
    assert describe_restart({**BY_TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3"}) == "restart 1 of 3"
    assert count_starts(tmp_path) == 0
    for step in (0, 0, 12):
        record(tmp_path, step, limit=3, environ=BY_HAND)
    (tmp_path / "starts.jsonl").open("a").write('{"step": 7, "autom')
    assert count_starts(tmp_path) == 3


def test_a_new_run_of_a_sweep_has_the_id_of_its_agent(tmp_path):
    environ = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "abcd1234"}
    assert choose_run_id(tmp_path, "", "a", environ) == "abcd1234"
    assert choose_run_id(tmp_path, "", "a", {**environ, **BY_TORCHRUN}) == "abcd1234"
    assert choose_run_id(tmp_path, "12345678", "a", environ) == "12345678"  # a checkpoint of an earlier trial
    assert choose_run_id(tmp_path, "", "a", {"WANDB_RUN_ID": "abcd1234"}) != "abcd1234"  # no sweep
    assert len(choose_run_id(tmp_path, "", "a", {**environ, "WANDB_RUN_ID": "../x"})) == 8


def test_process_age_counts_from_the_start_of_the_process():
    """Field 22 of stat is in ticks of 10 ms, rounded down: the age is at most one tick too large."""
    before = time.monotonic()
    script = "import torch; from distlenet.training.starts import process_age_s; print(process_age_s())"
    ended = run_command(sys.executable, "-c", script)
    elapsed = time.monotonic() - before
    assert 0.1 < float(ended.succeeded().stdout) < elapsed + 0.01  # the import of torch alone takes more than 0.1 s
