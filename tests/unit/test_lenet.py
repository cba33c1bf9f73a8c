import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distlenet.config.schema import ModelConfig
from distlenet.models.lenet import Net
from distlenet.models.networks import make_model

pytestmark = pytest.mark.unit


class TutorialNet(nn.Module):
    """An independent implementation of the tutorial's network."""

    def __init__(self) -> None:
        super().__init__()
        for name, layer in {
            "conv1": nn.Conv2d(1, 6, 3),
            "conv2": nn.Conv2d(6, 16, 3),
            "fc1": nn.Linear(16 * 6 * 6, 120),
            "fc2": nn.Linear(120, 84),
            "fc3": nn.Linear(84, 10),
        }.items():
            self.add_module(name, layer)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(conv(x).relu(), (2, 2))
        x = torch.flatten(x, 1)
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def test_a_state_dict_of_the_tutorial_loads_and_gives_the_same_logits():
    torch.manual_seed(1)
    tutorial, net = TutorialNet(), Net()
    net.load_state_dict(tutorial.state_dict())
    x = torch.randn(5, 1, 32, 32)
    assert torch.equal(net(x), tutorial(x))  # the same kernels on the same numbers: no tolerance


def test_number_of_parameters():
    assert sum(p.numel() for p in Net().parameters()) == 81_194


def test_print_shows_the_five_layers():
    layers = re.findall(r"\((\w+)\): (Conv2d|Linear)", str(Net()))
    assert layers == [
        ("conv1", "Conv2d"), ("conv2", "Conv2d"), ("fc1", "Linear"), ("fc2", "Linear"), ("fc3", "Linear")
    ]  # fmt: skip


def test_num_flat_features():
    assert Net().num_flat_features(torch.zeros(7, 16, 6, 6)) == 576


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 28, 28), (1, 32, 32), (32, 32), (4, 1, 32, 33)])
def test_another_input_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=re.escape("(B, 1, 32, 32)") + ".*" + re.escape(str(shape))):
        Net()(torch.zeros(shape))


def test_an_empty_batch_gives_zero_gradients():
    """A rank may get no image of a short last batch, and still takes part in the all-reduce."""
    net = Net()
    net(torch.empty(0, 1, 32, 32)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())


@pytest.mark.parametrize("channels_last", [False, True])
def test_make_model_selects_the_memory_format(channels_last):
    model = make_model(ModelConfig(channels_last=channels_last))
    assert isinstance(model, Net)
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
