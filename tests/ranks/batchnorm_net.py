"""A network with BatchNorm, for ``model.name=batchnorm_net:BatchNormNet``."""

import torch
from torch import nn


class BatchNormNet(nn.Sequential):
    """Running statistics by two rules, a constant that must stay as it is, and a counter of forward passes."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.BatchNorm2d(6, momentum=None),  # the average over all steps, which num_batches_tracked counts
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 10),
        )
        self.register_buffer("mask", torch.full((10,), 0.0).index_fill(0, torch.tensor([3]), -1e30))
        self.register_buffer("shift", torch.zeros(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x), "a batch without samples"
        logits = super().forward(x)
        if self.training:  # replaces the buffer instead of writing to it
            self.shift = 0.9 * self.shift + 0.1 * logits.detach().float().mean(0)
        return logits - self.shift + self.mask
