"""The LeNet-style ``Net`` of PyTorch's "Neural Networks" tutorial, layer for layer."""

import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SHAPE = (1, 32, 32)


class Net(nn.Module):
    """Two convolutions and three linear layers with 81,194 parameters.

    Input: images (B, 1, 32, 32) of a floating dtype. Output: logits (B, 10) of the same dtype. Parameter names are
    those of the tutorial, so state dicts load in both directions.

    Source: https://pytorch.org/tutorials/beginner/blitz/neural_networks_tutorial.html
    """

    def __init__(self) -> None:
        """Create the layers with PyTorch's default initialisation."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, 10) of images (B, 1, 32, 32). Raise ValueError for any other shape."""
        if x.ndim != 4 or x.shape[1:] != INPUT_SHAPE:
            raise ValueError(f"Net takes images of shape (B, 1, 32, 32), but got {tuple(x.shape)}")
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 15, 15)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 6, 6)
        x = x.reshape(-1, self.num_flat_features(x))  # not view(): x may be in channels-last format
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits

    def num_flat_features(self, x: Tensor) -> int:
        """Return the number of features per sample: the product of all dimensions of ``x`` except the first."""
        return x.shape[1:].numel()
