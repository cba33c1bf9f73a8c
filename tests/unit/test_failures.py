"""Failure reports: which ranks print what."""

import pytest
import torch
from torch.distributed import HashStore

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.failures import MAX_REPORTS, report_failures
from distlenet.distributed.rank_log import RankLog
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def fail(store, rank, error):
    env = DistributedEnvironment(rank=rank, world_size=20)
    with pytest.raises(type(error)), report_failures(store, env, RankLog(env, torch.device("cpu"))):
        raise error


def test_the_first_failure_has_a_traceback_the_next_one_line_and_the_rest_nothing(capsys):
    store = HashStore()
    fail(store, 7, MemoryError("none left"))
    first = capsys.readouterr().err.splitlines()
    assert first[0].startswith("distlenet: rank 7 of 20 on ")
    assert first[0].endswith(" failed:")
    assert first[1] == "  Traceback (most recent call last):"
    assert "/failures.py" not in first[2]
    assert first[-1] == "  MemoryError: none left"
    for rank in range(1, MAX_REPORTS):
        fail(store, rank, RuntimeError("Connection closed by peer\n" + 500 * "x"))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"distlenet: rank {rank} of 20 on ")
        assert "failed after it: RuntimeError: Connection closed by peer xxx" in line
        assert len(line) < 300
    fail(store, 19, RuntimeError("x"))
    assert capsys.readouterr().err == ""


def test_a_lost_connection_is_explained(capsys):
    fail(HashStore(), 0, RuntimeError("Connection closed by peer [10.0.0.2]:2000"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "distlenet: another rank has exited without a report: killed, out of memory, or its node is down"
    )


def test_without_a_store_every_rank_prints_its_traceback(capsys):
    class UnreachableStore:
        def set_timeout(self, _):
            raise RuntimeError("the store does not respond")

    fail(UnreachableStore(), 3, ValueError("x"))
    assert "  ValueError: x" in capsys.readouterr().err


def test_a_user_error_is_not_reported_here(capsys):
    fail(HashStore(), 3, UserError("x"))
    assert capsys.readouterr().err == ""
