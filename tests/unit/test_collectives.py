"""Collectives in a group of one rank, and errors that other ranks report."""

import pytest
import torch

from distlenet.distributed import collectives
from distlenet.distributed.collectives import (
    any_rank,
    broadcast_from_local_rank_0,
    broadcast_object,
    gather,
    raise_on_all_ranks,
    sum_over_ranks,
)
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


@pytest.fixture
def messages(monkeypatch):
    """The error messages of three ranks, of which this process is rank 0."""
    others: list[str | None] = [None, None]
    monkeypatch.setattr(collectives, "all_gather_object", lambda own: [own, *others])
    return others


def test_tensors(group):
    values = torch.tensor([0.1, 0.2])
    total = sum_over_ranks(values)
    assert total.dtype == torch.float64
    assert total.tolist() == values.double().tolist()
    assert gather(values).tolist() == [values.tolist()]
    assert [any_rank(flag, torch.device("cpu")) for flag in (False, True)] == [False, True]


def test_objects(group):
    assert broadcast_object({"a": 1}) == {"a": 1}
    assert broadcast_from_local_rank_0("x", DistributedEnvironment()) == "x"


def test_the_value_of_the_own_node_is_returned(monkeypatch):
    monkeypatch.setattr(collectives, "all_gather_object", lambda own: [(0, "a"), (0, None), (1, "b"), own])
    assert broadcast_from_local_rank_0("ignored", DistributedEnvironment(3, 1, 4, 2, node_rank=1)) == "b"


def test_no_error(messages):
    passed = False
    with raise_on_all_ranks():
        passed = True
    assert passed
    assert not any(messages)


def test_an_error_of_another_rank_is_raised_with_its_rank(messages):
    messages[1] = "no data"
    with pytest.raises(UserError, match=r"^rank 2: no data$"), raise_on_all_ranks():
        pass


def test_an_error_of_all_ranks_is_raised_without_a_rank(messages):
    messages[:] = ["no data", "no data"]
    with pytest.raises(UserError, match=r"^no data$"), raise_on_all_ranks():
        raise UserError("no data")


def test_a_bug_is_raised_with_its_type(messages):
    with pytest.raises(ZeroDivisionError), raise_on_all_ranks():
        raise ZeroDivisionError
