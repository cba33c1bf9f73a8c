"""The outcome of one optimizer step."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from distlenet.utils.clock import Mark


class StepTimes(NamedTuple):
    """The moments of a step, without loading; without events in a captured step."""

    begin: Mark
    gradient_ready: Mark  # this rank's gradient was complete
    reduced: Mark  # the gradients of all ranks were summed
    end: Mark


@dataclass(frozen=True)
class DeviceResult:
    """The result of a step on the device; in a CUDA graph, the same tensors in every replay."""

    grad_norm: Tensor | None  # scalar; None if not computed
    stop: bool  # a rank has a stop request; always False if the host does not wait for the step
    skipped: bool  # also False if the host does not wait: the optimizer then decides on the device
    taken: bool  # the optimizer was called; False also if the loss scaler skipped the step
    times: StepTimes


@dataclass(frozen=True)
class StepResult:
    """The result of a step for the training loop, identical on all ranks except for the times."""

    lr: float
    stop: bool  # a rank has a stop request
    skipped: bool  # a loss or gradient is not finite; always False if the host does not wait for the step
    grad_norm: Tensor | None  # scalar on the device, before clipping
    times: StepTimes
