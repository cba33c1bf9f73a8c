"""The values that differ from step to step: one row of memory on the device, refreshed by one copy per step.

A CUDA graph reads them at fixed addresses. Nothing else is sent to the GPU for a step if the samples are there already.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distlenet.task import SampleKeys

RECENT_STEPS = 64
"""Steps whose inputs, flags and values are kept. The host is never that far ahead of a GPU (``StepFlags``)."""

_FIXED = 3  # slot, epoch, stop; then the learning rates and the indices


class StepInputs:
    """Learning rates, stop request, epoch and sample indices of the current step."""

    def __init__(self, device: torch.device, groups: int, samples: int) -> None:
        """Reserve memory for the learning rates of ``groups`` and the indices of up to ``samples`` samples."""
        length = _FIXED + groups + samples
        # One row per step: the copies of earlier steps may not have been made yet.
        host = torch.zeros(RECENT_STEPS, length, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.rows, self.integers = list(host.unbind()), host.numpy()
        self.floats = self.integers.view(np.float32)
        self.first_index = _FIXED + groups
        self.row = torch.zeros(length, dtype=torch.int64, device=device)
        floats = self.row.view(torch.float32)  # two per integer, of which the first is used
        self.slot = self.row[:1]  # int64 (1,): the number of the step, modulo RECENT_STEPS
        self.epoch = self.row[1]  # int64 scalar
        self.stop = floats[4]  # float32 scalar: 1 if this rank has a stop request
        self.lrs = [floats[2 * (_FIXED + group)] for group in range(groups)]  # float32 scalars
        self.indices = self.row[self.first_index :]

    def set(self, step: int, epoch: int, stop: bool, lrs: Sequence[float], indices: Tensor | None) -> None:
        """Send the values of optimizer step ``step`` to the device; ``indices``, int64 (n,), is on the host."""
        slot = step % RECENT_STEPS
        integers, floats = self.integers[slot], self.floats[slot]
        integers[0], integers[1], floats[4] = slot, epoch, stop
        for group, lr in enumerate(lrs):
            floats[2 * (_FIXED + group)] = lr
        if indices is not None:
            values = indices.numpy()
            integers[self.first_index : self.first_index + len(values)] = values
        self.row.copy_(self.rows[slot], non_blocking=True)

    def keys(self, seed: int, samples: int, epoch: int | None = None) -> SampleKeys:
        """Return the keys of the current step's ``samples`` samples, on the device.

        Without ``epoch``, the epoch is read on the device, too, as in a CUDA graph.
        """
        return SampleKeys(seed, self.epoch if epoch is None else epoch, self.indices[:samples])
