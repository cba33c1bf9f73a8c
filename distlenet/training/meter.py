"""Loss and metrics over samples: summed on the device, added over ranks when they are read."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from distlenet.distributed.collectives import sum_over_ranks
from distlenet.utils.exact_sums import LOSS_BITS, round_to_grid


@dataclass(frozen=True)
class Metrics:
    """Mean loss (nats per image), accuracy (0 to 1) and the number of images behind them."""

    loss: float
    accuracy: float
    count: int

    def to_dict(self) -> dict[str, float]:
        """Return the three as a dict."""
        return asdict(self)

    def named(self, split: str) -> dict[str, float]:
        """Return the three as ``test_loss`` and so on."""
        return {f"{split}_{name}": value for name, value in self.to_dict().items()}


class Meter:
    """Sums of loss, correct answers and images, of a window of steps and of the whole epoch.

    The sums are exact (see ``distlenet.utils.exact_sums``): they do not depend on who adds what, nor in which order.
    """

    def __init__(self, device: torch.device) -> None:
        """Start at zero."""
        self.epoch = torch.zeros(3, dtype=torch.float64, device=device)
        self.window_start = self.epoch.clone()

    def update(self, loss_sums: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count the summed losses (m,) of m micro-batches, with their logits (n, C) and labels (n,). No host sync."""
        self.epoch[0] += round_to_grid(loss_sums.double(), LOSS_BITS).sum()
        self.epoch[1] += (logits.argmax(1) == labels).sum()
        self.epoch[2] += len(labels)

    def window(self) -> Metrics:
        """Return the metrics since the last call, over all ranks. A collective, then a host sync."""
        metrics = _metrics(self.epoch - self.window_start)
        self.window_start.copy_(self.epoch)
        return metrics

    def total(self) -> Metrics:
        """Return the metrics since the last reset, over all ranks. A collective, then a host sync."""
        return _metrics(self.epoch)

    def reset(self) -> None:
        """Start anew."""
        self.epoch.zero_()
        self.window_start.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums over all ranks, from which any number of ranks can go on. A collective."""
        return {
            "epoch": sum_over_ranks(self.epoch).cpu(),
            "window_start": sum_over_ranks(self.window_start).cpu(),
        }

    def load_state_dict(self, state: dict[str, Tensor], rank: int) -> None:
        """Take up saved sums: rank 0 carries them, the others start at zero."""
        for mine, saved in ((self.epoch, state["epoch"]), (self.window_start, state["window_start"])):
            mine.copy_(saved if rank == 0 else torch.zeros_like(saved))


def _metrics(sums: Tensor) -> Metrics:
    loss, correct, count = sum_over_ranks(sums).tolist()
    return Metrics(loss / max(count, 1), correct / max(count, 1), int(count))
