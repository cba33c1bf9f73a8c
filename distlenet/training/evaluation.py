"""Evaluation of a model on a dataset: every sample once, over all ranks."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from distlenet.distributed.context import DistributedContext
from distlenet.task import Batch, ErrorAnalysis
from distlenet.training.meter import Meter, Metrics
from distlenet.training.outline import TaskOutline
from distlenet.training.predictions import Predictions
from distlenet.utils.eval_mode import eval_mode


@torch.no_grad()
def evaluate(
    outline: TaskOutline,
    model: nn.Module,
    batches: Iterable[Batch],
    expected: int,
    context: DistributedContext,
    analysis: ErrorAnalysis | None = None,
) -> Metrics:
    """Return the metrics of ``model`` over a set of ``expected`` samples; each rank has its share as ``batches``.

    ``model`` is the bare module, not its DDP wrapper: ranks may have different numbers of batches. ``analysis``
    receives all outputs. A collective, then a host sync. Raise RuntimeError if not every sample was counted once.
    """
    task, meter = outline.task, Meter(outline.metric_names, context.device, outline.weighted)
    predictions = Predictions(task, outline.metric_names) if outline.predicts else None
    with eval_mode(model):
        for batch in batches:
            data = batch.inputs(task)
            with context.autocast():
                result = outline.loss(model, data)
            meter.update(outline.values(result, data))
            if analysis is not None:
                analysis.update(result.outputs, data, batch.indices)
            if predictions is not None:
                predictions.update(result.outputs, data, batch.indices)  # host sync
    metrics = meter.total()  # collective, host sync
    if metrics.count != expected:
        raise RuntimeError(f"evaluation counted {metrics.count} samples of a set of {expected}")
    if predictions is not None:
        metrics = replace(metrics, means=metrics.means | predictions.metrics())  # collective
    return metrics
