"""Networks with BatchNorm, for ``model.name=batchnorm_net:BatchNormNet``."""

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


class ResidualNet(nn.Module):
    """A BatchNorm of the input, a downsample branch, and between BatchNorms dropout and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6, momentum=None))
        self.downsample = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10))
        self.register_buffer("shift", torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x), "a batch without samples"
        x = nn.functional.dropout(self.stem(x), 0.2, self.training)
        if self.training:  # replaces the buffer while other shards wait for the next BatchNorm
            self.shift = 0.9 * self.shift + 0.1 * x.detach().float().mean((0, 2, 3)).view(4, 1, 1)
        return self.head(self.block(x - self.shift) + self.downsample(nn.functional.dropout(x, 0.2, self.training)))
