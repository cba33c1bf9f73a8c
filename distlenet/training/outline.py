"""What a task returns for each sample: found out, and checked, with one sample before the first step."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distlenet.task import Data, Task
from distlenet.tracking.base import RESERVED_KEYS
from distlenet.utils.errors import UserError
from distlenet.utils.eval_mode import eval_mode
from distlenet.utils.exact_sums import LOSS_BITS
from distlenet.utils.nested import count_samples, map_tensors

SMALLEST_WEIGHT = 1e-3
"""Smaller weights would lose digits: weights are rounded to multiples of 2**-20, so that their sums are exact."""


@dataclass(frozen=True)
class SampleLosses:
    """What ``Task.loss`` returned for n samples."""

    losses: Tensor  # (n,)
    weights: Tensor | None  # float32 (n,), multiples of 2**-20 without a gradient; None without weights
    outputs: Any


@dataclass(frozen=True)
class TaskOutline:
    """The values per sample that a task returns."""

    task: Task
    metric_names: tuple[str, ...]
    weight_unit: float | None = None  # a power of two near the weight of a sample; None without weights
    predicts: bool = False  # whether the task has metrics over all predictions

    @property
    def weighted(self) -> bool:
        """Return whether the task weights its losses."""
        return self.weight_unit is not None

    def loss(self, model: nn.Module, data: Data) -> SampleLosses:
        """Call ``Task.loss``. A negative weight becomes NaN, and so does the loss. No host sync.

        Raise UserError if a BatchNorm has a single value per channel.
        """
        try:
            losses, outputs = self.task.loss(model, data)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a micro-batch of {count_samples(data)} has no batch statistics: {error}; give data.drop_last=true, a "
                "larger train.global_batch_size, or fewer micro-batches"
            ) from error
        if not isinstance(losses, tuple):
            return SampleLosses(losses, None, outputs)
        losses, weights = losses
        weights = (weights.detach().float() * 2.0**LOSS_BITS).round() * 2.0**-LOSS_BITS
        return SampleLosses(losses, torch.where(weights >= 0, weights, math.nan), outputs)

    def sums(self, result: SampleLosses) -> tuple[Tensor, Tensor | None]:
        """Return the sums, over samples, of the weighted losses and of the weights, scalars. No host sync.

        Weights are in units of ``weight_unit``: then the gradients of all tasks are of similar size, as the grid of
        ``exact`` and loss scaling need it.
        """
        if result.weights is None or self.weight_unit is None:
            return result.losses.sum(), None
        weights = result.weights / self.weight_unit  # exact, as the unit is a power of two
        return (weights * result.losses).sum(), weights.double().sum()

    def values(self, result: SampleLosses, data: Data) -> Tensor:
        """Return loss and metrics per sample, (1 + number of metrics, n), of the dtype of the losses. No host sync.

        With weights, the first row is weight times loss, one more row holds the weights, and the dtype is float64.
        """
        metrics = self.task.metrics(map_tensors(Tensor.detach, result.outputs), data)
        losses = result.losses.detach()
        if result.weights is None:
            return torch.stack([losses, *(metrics[name].to(losses.dtype) for name in self.metric_names)])
        weights = result.weights.double()
        return torch.stack([weights * losses, *(metrics[name].double() for name in self.metric_names), weights])

    def join(self, values: list[Tensor], device: torch.device) -> Tensor:
        """Join the values of micro-batches; a rank without samples has none, and n is 0."""
        if not values:
            dtype = torch.float64 if self.weighted else torch.float32
            return torch.zeros(1 + len(self.metric_names) + self.weighted, 0, dtype=dtype, device=device)
        return values[0] if len(values) == 1 else torch.cat(values, 1)


@torch.no_grad()
def outline_of(task: Task, model: nn.Module, example: Data, autocast: AbstractContextManager[Any]) -> TaskOutline:
    """Compute loss and metrics of one transformed sample, in evaluation mode, and return their outline.

    Raise UserError if they are not one number per sample.
    """
    name = type(task).__name__
    with eval_mode(model):
        with autocast:
            result = task.loss(model, example)
        if not isinstance(result, tuple) or len(result) != 2:
            raise UserError(
                f"{name}.loss: returned {describe(result)}; expected two values: the losses, one per sample, and the "
                "outputs of the network"
            )
        losses, outputs = result
        metrics = task.metrics(outputs, example)
        if not isinstance(metrics, dict):
            raise UserError(f"{name}.metrics: returned {describe(metrics)}; expected a dict of tensors (n,) by name")
        prediction = task.prediction(outputs, example)
    weight_unit = None
    if isinstance(losses, tuple) and len(losses) == 2:
        losses, weights = losses
        weight_unit = _weight_unit(name, weights)
    if not isinstance(losses, Tensor) or losses.shape != (1,) or not losses.is_floating_point():
        raise UserError(
            f"{name}.loss: expected one floating-point loss per sample, of shape (1,) for one sample, but got "
            f"{describe(losses)}; return the losses without averaging them, for example with reduction='none'"
        )
    for metric, values in metrics.items():
        if metric in RESERVED_KEYS:
            raise UserError(f"{name}.metrics: {metric}: this name is taken; give the metric another one")
        if not isinstance(values, Tensor) or values.shape != (1,):
            raise UserError(
                f"{name}.metrics: {metric}: expected one value per sample, of shape (1,) for one sample, but got "
                f"{describe(values)}"
            )
    if prediction is None and type(task).summary_metrics is not Task.summary_metrics:
        raise UserError(f"{name}.summary_metrics: needs {name}.prediction, which returns None; define both")
    if prediction is not None and not isinstance(prediction, dict):
        raise UserError(
            f"{name}.prediction: returned {describe(prediction)}; expected a dict of tensors (n, ...) or lists by name"
        )
    for key, values in (prediction or {}).items():
        one = len(values) == 1 if isinstance(values, list) else isinstance(values, Tensor) and values.shape[:1] == (1,)
        if not one:
            raise UserError(
                f"{name}.prediction: {key}: expected a tensor (n, ...) or a list with one item per sample, n is 1, "
                f"but got {describe(values)}"
            )
    return TaskOutline(task, tuple(metrics), weight_unit, prediction is not None)


def _weight_unit(name: str, weights: Any) -> float:
    """Return the power of two nearest to the weight of one sample, or 1 if it is 0.

    Raise UserError if it is not a weight.
    """
    if not isinstance(weights, Tensor) or weights.shape != (1,) or not weights.is_floating_point():
        raise UserError(
            f"{name}.loss: expected one floating-point weight per sample, of shape (1,) for one sample, but got "
            f"{describe(weights)}; return losses (n,) and weights (n,)"
        )
    weight = float(weights)
    if not 0 <= weight < math.inf or 0 < weight < SMALLEST_WEIGHT:
        raise UserError(
            f"{name}.loss: expected weights of 0, or from {SMALLEST_WEIGHT:g} on, but got {weight:g}; only their "
            "ratios matter, so multiply all of them by a constant"
        )
    return 2.0 ** round(math.log2(weight)) if weight else 1.0


def describe(value: Any) -> str:
    """Return the type of a value, and the shape of a tensor, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
