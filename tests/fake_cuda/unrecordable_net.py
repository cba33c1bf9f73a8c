"""A network whose step cannot be captured on one rank: it reads a value of the device."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class UnrecordableNet(nn.Module):
    """A linear layer; on ``rank``, a capture fails in it."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank, self.layer = rank, nn.Linear(28 * 28, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.flatten(1))
        if torch.cuda.is_current_stream_capturing() and dist.get_rank() == self.rank:
            out.sum().item()
        return out
