"""Metrics over the predictions of a whole set, such as AUC, which are not averages over samples."""

from typing import Any

import torch
from torch import Tensor

from distlenet.distributed.collectives import from_rank_0, gather_on_rank_0
from distlenet.task import Data, Task
from distlenet.tracking.base import RESERVED_KEYS
from distlenet.training.outline import describe
from distlenet.utils.errors import UserError
from distlenet.utils.nested import map_tensors

Chunk = tuple[int, dict[str, Any]]
"""The index of the first of some consecutive samples, and their predictions by name."""


class Predictions:
    """The predictions of this rank's samples, in host memory, until they are gathered."""

    def __init__(self, task: Task, metric_names: tuple[str, ...]) -> None:
        """``metric_names`` are the metrics per sample, whose names are taken."""
        self.task, self.metric_names = task, metric_names
        self.chunks: list[Chunk] = []

    def update(self, outputs: Any, data: Data, indices: Tensor) -> None:
        """Add the predictions for consecutive samples. A host sync. Raise UserError if they are not one per sample."""
        prediction = self.task.prediction(outputs, data) or {}
        for name, values in prediction.items():
            if len(values) != len(indices):
                raise UserError(
                    f"{type(self.task).__name__}.prediction: {name}: expected one item for each of {len(indices)} "
                    f"samples, but got {len(values)}"
                )
        # A copy: a part of a larger tensor would be sent with all of it.
        copy = map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), prediction)
        self.chunks.append((int(indices[0]), copy))

    def metrics(self) -> dict[str, float]:
        """Return ``Task.summary_metrics`` of all samples, in their order in the dataset. A collective.

        Rank 0 computes them. Raise UserError, on every rank, if they are not a dict of numbers with unused names.
        """
        gathered = gather_on_rank_0(self.chunks)  # collective
        self.chunks = []

        def compute() -> dict[str, float]:
            chunks = sorted((chunk for chunks in gathered for chunk in chunks), key=lambda chunk: chunk[0])
            names = chunks[0][1] if chunks else ()
            predictions = {name: _join([chunk[name] for _, chunk in chunks]) for name in names}
            return self._check(self.task.summary_metrics(predictions))

        return from_rank_0(compute)  # collective

    def _check(self, metrics: Any) -> dict[str, float]:
        place, checked = f"{type(self.task).__name__}.summary_metrics", {}
        if not isinstance(metrics, dict):
            raise UserError(f"{place}: returned {describe(metrics)}; expected a dict of numbers by name")
        for name, value in metrics.items():
            if name in RESERVED_KEYS or name in self.metric_names:
                raise UserError(f"{place}: {name}: this name is taken; give the metric another one")
            try:
                checked[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{place}: {name}: expected a number, but got a {type(value).__name__}") from error
        return checked


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [item for part in parts for item in part]
