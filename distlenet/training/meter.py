"""Loss and metrics over samples: summed on the device, added over ranks when they are read.

Means are over samples; with weighted losses, ``loss`` is the weighted mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distlenet.distributed.collectives import sum_over_ranks
from distlenet.training.step_inputs import RECENT_STEPS
from distlenet.utils.errors import UserError
from distlenet.utils.exact_sums import LOSS_BITS, round_to_grid


@dataclass(frozen=True)
class Metrics:
    """Means over samples by name (``loss``, then the task's metrics), and the number of samples.

    Those of an evaluation also hold the task's ``summary_metrics``.
    """

    means: dict[str, float]
    count: int

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Return means and count, with ``prefix`` before each name."""
        return {f"{prefix}{name}": value for name, value in {**self.means, "count": self.count}.items()}


class Meter:
    """Sums of loss and metrics, over a window of steps and over the epoch.

    The sums are exact (see ``distlenet.utils.exact_sums``): they do not depend on the order of samples and ranks.
    """

    def __init__(self, metric_names: Sequence[str], device: torch.device, weighted: bool = False) -> None:
        self.names, self.weighted = ("loss", *metric_names), weighted
        # The last is the count; before it, if the losses are weighted, the sum of the weights.
        self.epoch = torch.zeros(len(self.names) + weighted + 1, dtype=torch.float64, device=device)
        self.window_start = self.epoch.clone()

    def update(self, values: Tensor, slot: Tensor | None = None) -> None:  # noqa: ARG002
        """Add the values of n samples, as ``TaskOutline.values`` returns them. No host sync.

        ``slot`` is ``StepInputs.slot``, in a training step.
        """
        self._add(values, values.shape[1])

    def count(self, step: int, samples: int) -> None:
        """Count the samples of this rank in optimizer step ``step``, whose values ``update`` received. No host sync."""

    def window(self) -> Metrics:
        """Return the means since the last call, over all ranks. A collective, then a host sync."""
        self._settle()
        metrics = self._metrics(self.epoch - self.window_start)
        self.window_start.copy_(self.epoch)
        return metrics

    def total(self) -> Metrics:
        """Return the means since the last reset, over all ranks. A collective, then a host sync."""
        self._settle()
        return self._metrics(self.epoch)

    def reset(self) -> None:
        """Start a new epoch."""
        self._settle()
        self.epoch.zero_()
        self.window_start.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums over all ranks, from which any number of ranks can resume. A collective."""
        self._settle()
        return {"epoch": sum_over_ranks(self.epoch).cpu(), "window_start": sum_over_ranks(self.window_start).cpu()}

    def load_state_dict(self, state: dict[str, Tensor], rank: int) -> None:
        """Load saved sums: rank 0 holds them, the others start at zero."""
        for name in ("epoch", "window_start"):
            getattr(self, name).copy_(state[name] if rank == 0 else torch.zeros_like(state[name]))

    def _add(self, values: Tensor, samples: int) -> None:
        self.epoch[:-1] += round_to_grid(values.double(), LOSS_BITS).sum(1)
        self.epoch[-1] += samples

    def _settle(self) -> None:
        """Add what ``update`` has only stored."""

    def _metrics(self, sums: Tensor) -> Metrics:
        *totals, count = sum_over_ranks(sums).tolist()
        weight = totals.pop() if self.weighted else count
        means = {name: total / max(count, 1) for name, total in zip(self.names, totals, strict=True)}
        if self.weighted and count:
            if not weight:
                raise UserError(f"loss: the weights of all {count:.0f} samples are 0, so they have no mean")
            means["loss"] = totals[0] / weight
        return Metrics(means, int(count))


class DeferredMeter(Meter):
    """Stores the values of steps, and adds them every 64 steps and when they are read: two kernels per step, not ten.

    The sums are the same, since they are exact.
    """

    def __init__(self, metric_names: Sequence[str], device: torch.device, weighted: bool, max_samples: int) -> None:
        """Store the values of up to ``max_samples`` samples per step."""
        super().__init__(metric_names, device, weighted)
        self.max_samples = max_samples
        self.recent: Tensor | None = None  # (RECENT_STEPS, rows, max_samples), from the first step on
        self.first_slot, self.steps, self.samples = 0, 0, 0  # not yet added

    def update(self, values: Tensor, slot: Tensor | None = None) -> None:
        """Store the values of n samples, (rows, n), in ``slot``, int64 (1,) on the device. No host sync."""
        assert slot is not None
        if self.recent is None:
            dtype = torch.promote_types(values.dtype, torch.float32)
            shape = RECENT_STEPS, len(values), self.max_samples
            self.recent = torch.zeros(shape, dtype=dtype, device=values.device)
        if (missing := self.max_samples - values.shape[1]) > 0:
            values = torch.nn.functional.pad(values, (0, missing))  # zeros do not change a sum
        self.recent.index_copy_(0, slot, values.to(self.recent.dtype).unsqueeze(0))

    def count(self, step: int, samples: int) -> None:
        """Count the samples of a step; add all stored values if it was the last one for which there is room."""
        if not self.steps:
            self.first_slot = step % RECENT_STEPS
        self.steps, self.samples = self.steps + 1, self.samples + samples
        if self.first_slot + self.steps == RECENT_STEPS:
            self._settle()

    def _settle(self) -> None:
        if self.steps and self.recent is not None:
            stored = self.recent[self.first_slot : self.first_slot + self.steps]
            self._add(stored.transpose(0, 1).flatten(1), self.samples)
        self.steps, self.samples = 0, 0
