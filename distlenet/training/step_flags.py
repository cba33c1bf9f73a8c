"""The flags of recent steps, read by the host when they are ready, so that it does not wait for the current step.

A flag is what the all-reduce of a step returned (``ReductionResult.flag``): positive if any rank has a stop request,
NaN if something was not finite.
"""

import math
from collections import deque

import torch
from torch import Tensor
from torch.optim import Optimizer

from distlenet.training.step_inputs import RECENT_STEPS

DELAY = 4
"""Steps until the host reads a flag: it is ready by then. All ranks read that of the same step.

The host is never further ahead of the GPU than that.
"""


class StepFlags:
    """Prevents the first nonfinite step and all later ones from changing the weights, and returns stop requests.

    The optimizer itself skips these steps, on the device: its fused kernel takes no step if ``found_inf`` is 1, which
    it reads for loss scaling (https://docs.pytorch.org/docs/stable/notes/amp_examples.html). With loss scaling, which
    skips bad steps anyway, it is not set.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device, loss_scaling: bool) -> None:
        on_gpu = device.type == "cuda"
        self.values = torch.zeros(RECENT_STEPS, device=device)
        self.host = torch.zeros(RECENT_STEPS, pin_memory=on_gpu)
        self.found_inf, self.one = torch.zeros((), device=device), torch.ones((), device=device)
        if not loss_scaling:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.events = [torch.cuda.Event() for _ in range(DELAY)] if on_gpu else []
        self.stream = torch.cuda.current_stream(device) if on_gpu else None  # a lookup takes 4 µs
        self.unread: deque[int] = deque()  # steps
        self.stop = False
        self.bad_step: int | None = None

    def record(self, flag: Tensor, slot: Tensor) -> None:
        """Keep the flag of a step, a scalar, and skip the step if it is NaN. No host sync.

        ``slot`` is ``StepInputs.slot``, int64 (1,).
        """
        torch.where(flag == flag, self.found_inf, self.one, out=self.found_inf)
        self.values.index_copy_(0, slot, flag.detach().float().view(1))
        self.host.copy_(self.values, non_blocking=True)  # all: a CUDA graph copies between fixed addresses

    def poll(self, step: int) -> bool:
        """Return whether a rank has a stop request, as far as the flags up to ``step`` - ``DELAY`` show.

        No host sync, unless the GPU is ``DELAY`` steps behind.
        """
        if len(self.unread) == DELAY:
            self._read(self.unread.popleft())
        self.unread.append(step)
        if self.events:
            self.events[step % DELAY].record(self.stream)
        return self.stop

    def first_bad_step(self) -> int | None:
        """Return the first step whose flag is NaN, or None. A host sync."""
        while self.unread:
            self._read(self.unread.popleft())
        return self.bad_step

    def _read(self, step: int) -> None:
        if self.events and not self.events[step % DELAY].query():
            self.events[step % DELAY].synchronize()  # host sync
        flag = float(self.host[step % RECENT_STEPS])
        self.stop |= flag > 0
        if math.isnan(flag) and self.bad_step is None:
            self.bad_step = step
