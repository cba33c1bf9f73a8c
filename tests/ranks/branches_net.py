"""A network whose layers depend on its input, for ``model.name=branches_net:BranchesNet``."""

import torch
from torch import nn


class BranchesNet(nn.Module):
    """Each micro-batch uses one of two layers, by its number of samples of even brightness; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(784, 10), nn.Linear(784, 10), nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        even = (flat[:, :392].sum(1) > flat[:, 392:].sum(1)).sum()
        return (self.first if even % 2 else self.second)(flat)


class UnusedLayerNet(BranchesNet):
    """Never uses one layer; uses another one in training mode only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.first(x.flatten(1))
        return logits + self.second(x.flatten(1)) if self.training else logits


class TrainingLayerNet(UnusedLayerNet):
    """Uses all layers in training mode, but not in evaluation mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits + self.unused(x.flatten(1)) if self.training else logits
