"""Collectives in a group of one rank, and errors that other ranks report."""

import pickle

import pytest
import torch
import torch.distributed as dist

from distlenet.distributed import collectives
from distlenet.distributed.collectives import (
    any_rank,
    broadcast_from_local_rank_0,
    broadcast_object,
    broadcast_state,
    gather,
    raise_on_all_ranks,
    sum_over_ranks,
)
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import UserError
from distlenet.utils.nested import tensors_in

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


def test_a_state_is_sent_in_parts(monkeypatch):
    """Rank 0 records what it sends, then another rank receives it."""
    state = {
        "large": torch.arange(24.0, dtype=torch.float64).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "list": [torch.ones(50, dtype=torch.cfloat) * 2j, torch.arange(99) % 2 == 0, torch.ones(40).bfloat16()],
        "expanded": torch.ones(1).expand(100),
        "sparse": torch.eye(30).to_sparse(),
        "small": torch.ones(2),
        "step": 3,
    }
    sent, sizes = [], []

    def send(tensor, src):
        assert src == 0
        sizes.append(tensor.nbytes)
        sent.append(tensor.clone())

    def run(rank, value, broadcast_object, broadcast):
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(collectives, "broadcast_object", broadcast_object)
        monkeypatch.setattr(dist, "broadcast", broadcast)
        return broadcast_state(value, torch.device("cpu"))

    monkeypatch.setattr(collectives, "LARGE_BYTES", 64)
    monkeypatch.setattr(collectives, "PART_BYTES", 100)
    assert run(0, state, lambda value: sent.append(pickle.dumps(value)) or value, send) is state
    assert sizes == [100, 92, 100, 100, 100, 100, 99, 80]
    received = run(
        1,
        {},
        lambda _: pickle.loads(sent.pop(0)),
        lambda tensor, src: tensor.copy_(sent.pop(0)),  # noqa: ARG005
    )
    assert not sent
    assert received["step"] == 3
    for own, other in zip(tensors_in(state), tensors_in(received), strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own.to_dense(), other.to_dense())
    assert received["large"].stride() == state["large"].stride()


@pytest.mark.parametrize(("rank", "node", "value"), [(1, 0, "a"), (3, 1, "b")])
def test_the_value_of_the_own_node_is_returned(monkeypatch, rank, node, value):
    """The second rank of a node receives the values of both nodes, one after the other."""
    values = {0: "a", 2: "b"}

    def broadcast(sent, src):
        sent[0] = values.pop(src)

    monkeypatch.setattr(collectives, "all_gather_object", lambda _: [(0, 0), (0, 1), (1, 0), (1, 1)])
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert broadcast_from_local_rank_0("ignored", DistributedEnvironment(rank, 1, 4, 2, node_rank=node)) == value
    assert not values


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
