"""Who tells of a failure, and how."""

import pytest
import torch
from torch.distributed import HashStore

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.failures import MOST, report_failures
from distlenet.distributed.rank_log import RankLog
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def fail(store, rank, error, ranks=20):
    env = DistributedEnvironment(rank=rank, world_size=ranks)
    log = RankLog(env, torch.device("cpu"))
    with pytest.raises(type(error)), report_failures(store, env, log):
        raise error


def test_the_first_tells_all_the_next_a_line_and_the_rest_nothing(capsys):
    store = HashStore()
    fail(store, 7, MemoryError("none left"))
    first = capsys.readouterr().err.splitlines()
    assert first[0].startswith("distlenet: rank 7 of 20 on ")
    assert first[0].endswith(" failed:")
    assert first[1] == "  Traceback (most recent call last):"
    assert first[-1] == "  MemoryError: none left"
    for rank in range(1, MOST):
        fail(store, rank, RuntimeError("Connection closed by peer\n" + 500 * "x"))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"distlenet: rank {rank} of 20 on ")
        assert "failed after it: RuntimeError: Connection closed by peer xxx" in line
        assert len(line) < 300
    fail(store, 19, RuntimeError("x"))
    assert capsys.readouterr().err == ""


def test_a_peer_that_went_without_a_word_is_guessed(capsys):
    fail(HashStore(), 0, RuntimeError("Connection closed by peer [10.0.0.2]:2000"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "distlenet: another rank has gone without a word: killed, out of memory, or its node is down"
    )


def test_without_a_store_each_tells_all(capsys):
    class Gone:
        def set_timeout(self, _):
            raise RuntimeError("the store is gone")

    fail(Gone(), 3, ValueError("x"))
    assert "  ValueError: x" in capsys.readouterr().err


def test_what_the_user_can_mend_is_told_elsewhere(capsys):
    fail(HashStore(), 3, UserError("x"))
    assert capsys.readouterr().err == ""
