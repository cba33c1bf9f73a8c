"""The protocol of gradient reduction.

    def compute(micro_batch):
        result = outline.loss(reducer.model, micro_batch.data)
        step.backward(*outline.sums(result))

    with reducer.step(batch.global_size, stop) as step:
        step.map(compute, inputs)
    step.result

At the end of the ``with`` block each parameter's ``grad`` is the gradient of the mean loss over the global batch.
Losses are summed, not averaged, and divided by the size of the global batch: so neither a short last batch, nor a short
micro-batch, nor a rank with fewer samples changes the gradient. Two more values travel in the same all-reduce: whether
any rank has a stop request, and whether the loss of any rank is not finite. With weighted losses, the sum of the
weights travels there, too, and the gradients are divided by it afterwards: before, no rank knows it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from distlenet.reduction.buffers import BufferAverage
from distlenet.task import Data
from distlenet.utils.clock import Mark

T = TypeVar("T")

ExampleLoss = Callable[[nn.Module], Tensor]
"""Returns the loss, a scalar, of a model on an example of the data."""


class MicroBatch(NamedTuple):
    """A part of a rank's share of a global batch."""

    number: int  # within the global batch, unique over all ranks
    data: Data


@dataclass(frozen=True)
class ReductionResult:
    """The result of a step, identical on all ranks."""

    # Scalar, positive if any rank has a stop request. NaN if the step must not be taken: a loss or the change of a
    # buffer, or with ``exact`` a gradient, is not finite or too large to sum exactly, or all weights are 0.
    flag: Tensor
    gradient_ready: Mark  # this rank's gradient was complete
    reduced: Mark  # the gradients of all ranks were summed
    buffer_change: Tensor | None  # for ``BufferAverage.apply``, if the step is taken; None if no buffer changes


def mark_nonfinite(flag: Tensor, change: Tensor | None, weight: Tensor | None) -> Tensor:
    """Return ``flag``, or NaN if the change of the buffers is not finite, or the sum of the weights not positive.

    ``flag`` and ``weight`` are scalars, ``change`` is float64 (elements,). No host sync.
    """
    if weight is not None:
        flag = torch.where(weight > 0, flag, math.nan)
    return flag if change is None else flag + (change * 0).sum()


class ReductionStep(ABC):
    """One step, valid within the ``with`` block of ``Reducer.step``."""

    _result: ReductionResult | None = None

    def map(self, function: Callable[[MicroBatch], T], data: Data) -> list[T]:
        """Return what ``function`` returns for each micro-batch of a rank's share; it calls ``backward`` once.

        None is empty. A share without samples, such as ``()``, has none, and adds nothing. In ``ddp``, and with global
        statistics, that is a collective.
        """
        return [function(micro_batch) for micro_batch in self.micro_batches(data)]

    @abstractmethod
    def micro_batches(self, data: Data) -> Iterator[MicroBatch]:
        """Yield the micro-batches of ``map``; each needs one ``backward`` before the next."""

    @abstractmethod
    def backward(self, loss_sum: Tensor, weight_sum: Tensor | None = None) -> None:
        """Add the gradient of a micro-batch, whose losses sum to ``loss_sum``. In ``ddp``, the last is a collective.

        ``weight_sum`` is the sum of the weights, or None without weights.
        """

    @property
    def result(self) -> ReductionResult:
        """The result; after the ``with`` block only."""
        if self._result is None:
            raise RuntimeError("a step has no result before its with block ends")
        return self._result


class Reducer(Protocol):
    """Sums gradients over micro-batches and ranks."""

    @property
    def model(self) -> nn.Module:
        """The model for the forward pass of a step."""

    buffers: BufferAverage
    capture_after: int  # steps, before one can be captured in a CUDA graph
    micro_batch_size: int  # samples, at most
    micro_batches_per_rank: int

    def warm_up(self, example_loss: ExampleLoss) -> None:
        """Get into the state that a run without interruption has after its first steps. A collective."""

    def reset(self, example_loss: ExampleLoss) -> None:
        """Recover from a step that an exception ended. A collective."""

    def cap_micro_batch_size(self, limit: int) -> None:
        """Use no micro-batch of more than ``limit`` samples, but more of them: fewer ranks need no more memory each."""

    def split(self, data: Data) -> list[MicroBatch]:
        """Return the micro-batches of a rank's share, none of them empty."""

    def map(self, function: Callable[[MicroBatch], T], micro_batches: list[MicroBatch]) -> list[T]:
        """Return what ``function`` returns for each of all micro-batches of ``split``, outside a step.

        A collective if the model has global statistics.
        """

    def step(
        self, global_size: int, stop: Tensor, time_in_graph: bool = False
    ) -> AbstractContextManager[ReductionStep]:
        """Reduce the gradients of a global batch of ``global_size`` samples. A collective.

        ``stop`` is a scalar on the device, 1 if this rank has a stop request. ``time_in_graph``: see ``Clock.mark``. No
        host sync.
        """
