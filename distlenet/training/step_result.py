"""The outcome of one optimizer step."""

from dataclasses import dataclass

from torch import Tensor

from distlenet.reduction.reducer import ReductionResult
from distlenet.utils.clock import Mark


@dataclass(frozen=True)
class DeviceResult:
    """The result of a step on the device; in a CUDA graph, the same tensors in every replay."""

    reduction: ReductionResult
    grad_norm: Tensor | None  # scalar; None if not computed
    skipped: bool
    taken: bool  # the optimizer's step; False also if the loss scaler skipped it


@dataclass(frozen=True)
class StepResult:
    """The result of a step for the training loop, identical on all ranks except for the marks."""

    lr: float
    stop: bool  # a rank was asked to stop
    skipped: bool  # the step was not taken: a loss or gradient is not finite
    grad_norm: Tensor | None  # scalar on the device, before clipping
    gradient_ready: Mark
    reduced: Mark
