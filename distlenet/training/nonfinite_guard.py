"""Keeps a step whose loss or gradient is not finite away from the weights, on every rank alike."""

import torch
from torch import Tensor
from torch.optim import Optimizer


class Guard:
    """Says whether a step may be taken, from what all ranks know after its all-reduce.

    The host asks before each step is taken, which on a GPU means to wait for the device. Where that is too dear
    (``lag=True``) the optimizer asks on the device: from the first bad step on, its fused kernel takes none, until
    the host, which looks now and then, stops the run. Fused optimizers read ``found_inf`` for loss scaling, see
    https://docs.pytorch.org/docs/stable/notes/amp_examples.html; so with loss scaling, which skips such steps anyway,
    it is left alone.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, lag: bool, loss_scaling: bool) -> None:
        """Guard the steps of ``optimizer``."""
        self.lag = lag
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.seen = torch.zeros((), device=device)
        if lag and not loss_scaling:
            optimizer.found_inf = self.seen  # type: ignore[attr-defined]

    def begin(self, step: int) -> None:
        """Begin step ``step``."""
        self.step.fill_(step)

    def refuses(self, bad: Tensor) -> bool:
        """Say that the step is not to be taken, since ``bad``, a bool; always no where the host looks later."""
        if not self.lag:
            return bool(bad)  # host sync
        self.first_bad.copy_(torch.where((self.first_bad < 0) & bad, self.step, self.first_bad))
        self.seen.copy_(self.first_bad >= 0)
        return False

    def found(self) -> int | None:
        """Return the first bad step, where the host looks later. A host sync."""
        step = int(self.first_bad)
        return None if step < 0 else step
