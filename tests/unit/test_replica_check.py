import pytest
import torch
import torch.distributed as dist
from torch import nn

from distlenet.models.lenet import Net
from distlenet.reduction import replica_check
from distlenet.reduction.replica_check import ReplicaMismatch, check_replicas, fingerprints, named_state

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_flipped_bit_changes_the_fingerprint_of_its_parameter_only(dtype):
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
    before = fingerprints(model)
    generator = torch.Generator().manual_seed(0)
    for number, parameter in enumerate(model.parameters()):
        for _ in range(20):
            index = int(torch.randint(parameter.numel(), (1,), generator=generator))
            integer_type = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            bits = parameter.detach().view(-1).view(integer_type)
            mask = 1 << int(torch.randint(8 * parameter.element_size() - 1, (1,), generator=generator))
            bits[index] ^= mask
            assert [i for i, same in enumerate(fingerprints(model) == before) if not same] == [number]
            bits[index] ^= mask
    assert torch.equal(fingerprints(model), before)


def test_persistent_buffers_are_checked():
    """Running statistics, counters and complex constants; not caches, which may differ between ranks."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_buffer("rotations", torch.ones(2, dtype=torch.complex64))
    model.register_buffer("cache", torch.ones(2), persistent=False)
    before = fingerprints(model)
    assert set(named_state(model)) == set(model.state_dict())
    assert len(before) == 6
    for number, name in enumerate(named_state(model)):
        value = model.state_dict()[name]
        value.add_(1)
        assert [i for i, same in enumerate(fingerprints(model) == before) if not same] == [number]
        value.sub_(1)
    model.cache.add_(1)
    assert torch.equal(fingerprints(model), before)


def test_swapped_elements_change_the_fingerprint():
    layer = nn.Linear(4, 1, bias=False)
    before = fingerprints(layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    assert not torch.equal(fingerprints(layer), before)


def test_large_parameters_are_hashed_in_chunks(monkeypatch):
    """The fingerprints do not depend on the size of a chunk."""
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(7, 3)).requires_grad_(False)
    model.register_buffer("empty", torch.zeros(0))
    before = fingerprints(model)
    monkeypatch.setitem(replica_check.CHUNK, "cpu", 7)
    assert torch.equal(fingerprints(model), before)
    model[0].weight.copy_(model[0].weight.view(-1).roll(7).view(10, 10))
    assert [i for i, same in enumerate(fingerprints(model) == before) if not same] == [0]


@pytest.mark.usefixtures("group")
def test_single_rank_agrees_with_itself():
    model = Net()
    model.fc1.bias.data[0] = float("nan")  # bits are compared, not values
    before = fingerprints(model)
    check_replicas(model)
    assert torch.equal(fingerprints(model), before)


def test_mismatch_names_ranks_and_parameters(monkeypatch):
    """Three ranks: two hold the same model, rank 2 has another bias."""
    model = nn.Linear(2, 1)
    common = fingerprints(model)
    table = torch.stack([common, common, common + torch.tensor([0, 1])])
    monkeypatch.setattr(dist, "all_reduce", lambda extremes, _: extremes[0, 1].add_(1))
    monkeypatch.setattr(replica_check, "gather", lambda _: table)
    with pytest.raises(ReplicaMismatch, match=r"different parameters .*: rank 2: bias; check"):
        check_replicas(model)
