"""The network: the LeNet-style ``Net`` of PyTorch's "Neural Networks" tutorial, layer for layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SHAPE = (1, 32, 32)


class Net(nn.Module):
    """Two convolutions and three linear layers, 81,194 parameters.

    Takes images (B, 1, 32, 32) of a floating dtype and gives logits (B, 10) of that dtype. Parameter
    names are the tutorial's, so that a state dict saved by the tutorial's code loads here and back.

    Source: https://pytorch.org/tutorials/beginner/blitz/neural_networks_tutorial.html
    """

    def __init__(self) -> None:
        """Make the layers with PyTorch's default initialisation, from the global generator."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, 32, 32) to logits (B, 10).

        Raises ValueError for any other shape, naming both.
        """
        if x.ndim != 4 or x.shape[1:] != INPUT_SHAPE:
            raise ValueError(f"Net takes images of shape (B, 1, 32, 32), but got {tuple(x.shape)}")
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 15, 15)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 6, 6)
        x = x.reshape(-1, self.num_flat_features(x))  # not view: what lies channels last, it copies into order
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits

    def num_flat_features(self, x: Tensor) -> int:
        """Count the features of one sample: the product of all dimensions of ``x`` but the first."""
        return x.shape[1:].numel()


MODELS = {"lenet": Net}
"""Networks by the name that ``model.name`` takes. Add your own here."""


def make_model(name: str, channels_last: bool, device: torch.device) -> nn.Module:
    """Make a network on ``device``, its weights drawn from torch's generator.

    ``channels_last`` says how the weights of convolutions, and so their outputs, lie in memory; see
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return MODELS[name]().to(device).to(memory_format=layout)
