"""Keeps a step whose loss or gradient is not finite away from the weights, on all ranks."""

import torch
from torch import Tensor
from torch.optim import Optimizer


class NonfiniteGuard:
    """Decides whether a step is taken, from the result of its all-reduce.

    Normally the host decides before each step, which on a GPU means to wait for the device. When that is too
    expensive (``deferred=True``) the optimizer decides on the device: from the first bad step on, its fused kernel
    takes no step, until the host, which checks now and then, stops the run. Fused optimizers read ``found_inf`` for
    loss scaling (https://docs.pytorch.org/docs/stable/notes/amp_examples.html); with loss scaling, which skips bad
    steps anyway, the guard does not set it.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, deferred: bool, loss_scaling: bool) -> None:
        self.deferred = deferred
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), device=device)
        if deferred and not loss_scaling:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]

    def should_skip(self, nonfinite: Tensor, step: Tensor) -> bool:
        """Return whether to skip ``step``, an int64 scalar; always False if deferred.

        ``nonfinite`` is a bool scalar. A host sync, unless deferred.
        """
        if not self.deferred:
            return bool(nonfinite)  # host sync
        self.first_bad.copy_(torch.where((self.first_bad < 0) & nonfinite, step, self.first_bad))
        self.found_inf.copy_(self.first_bad >= 0)
        return False

    def first_bad_step(self) -> int | None:
        """Return the first bad step if deferred, or None. A host sync."""
        step = int(self.first_bad)
        return None if step < 0 else step
