"""What a task returns for each sample: found out, and checked, with one sample before the first step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distlenet.task import Data, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors


@dataclass(frozen=True)
class TaskOutline:
    """The values per sample that a task returns."""

    task: Task
    metric_names: tuple[str, ...]

    def values(self, losses: Tensor, outputs: Any, data: Data) -> Tensor:
        """Return loss and metrics per sample: (1 + number of metrics, n), of the dtype of ``losses``. No host sync."""
        metrics = self.task.metrics(map_tensors(Tensor.detach, outputs), data)
        losses = losses.detach()
        return torch.stack([losses, *(metrics[name].to(losses.dtype) for name in self.metric_names)])

    def join(self, values: list[Tensor], device: torch.device) -> Tensor:
        """Join the values of micro-batches; a rank without samples has none, and n is 0."""
        if not values:
            return torch.zeros(1 + len(self.metric_names), 0, device=device)
        return values[0] if len(values) == 1 else torch.cat(values, 1)


@torch.no_grad()
def outline_of(task: Task, model: nn.Module, example: Data, autocast: AbstractContextManager[Any]) -> TaskOutline:
    """Compute loss and metrics of one transformed sample, in evaluation mode, and return their outline.

    Raise UserError if they are not one floating-point number per sample.
    """
    name, was_training = type(task).__name__, model.training
    model.eval()
    try:
        with autocast:
            losses, outputs = task.loss(model, example)
        metrics = task.metrics(outputs, example)
    finally:
        model.train(was_training)
    if not isinstance(losses, Tensor) or losses.shape != (1,) or not losses.is_floating_point():
        raise UserError(
            f"{name}.loss: expected one floating-point loss per sample, of shape (1,) for one sample, but got "
            f"{_describe(losses)}; return the losses without averaging them, for example with reduction='none'"
        )
    for metric, values in metrics.items():
        if metric in ("loss", "count") or not isinstance(values, Tensor) or values.shape != (1,):
            raise UserError(
                f"{name}.metrics: {metric}: expected one value per sample, of shape (1,) for one sample, and a name "
                f"other than loss and count, but got {_describe(values)}"
            )
    return TaskOutline(task, tuple(metrics))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
