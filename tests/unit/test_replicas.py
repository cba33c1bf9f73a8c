import pytest
import torch
from torch import nn

from distlenet.models.lenet import Net
from distlenet.reduction.replica_check import check_replicas, fingerprints

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flipped_bit_changes_its_parameters_fingerprint_alone(dtype):
    net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
    before = fingerprints(net)
    generator = torch.Generator().manual_seed(0)
    for number, parameter in enumerate(net.parameters()):
        for _ in range(20):
            index = int(torch.randint(parameter.numel(), (1,), generator=generator))
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            bits = parameter.detach().view(-1).view(integers)
            flipped = 1 << int(torch.randint(8 * parameter.element_size() - 1, (1,), generator=generator))
            bits[index] ^= flipped
            assert [i for i, same in enumerate(fingerprints(net) == before) if not same] == [number]
            bits[index] ^= flipped
    assert torch.equal(fingerprints(net), before)


def test_swapped_elements_change_it():
    layer = nn.Linear(4, 1, bias=False)
    before = fingerprints(layer)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(1))
    assert not torch.equal(fingerprints(layer), before)


@pytest.mark.usefixtures("group")
def test_one_rank_agrees_with_itself():
    net = Net()
    net.fc1.bias.data[0] = float("nan")  # equal bits are what counts
    before = fingerprints(net)
    check_replicas(net)
    assert torch.equal(fingerprints(net), before)
