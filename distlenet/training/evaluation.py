"""Evaluation of a model on a dataset: every sample once, over all ranks."""

from collections.abc import Iterable

import torch
from torch import nn

from distlenet.distributed.context import DistributedContext
from distlenet.task import Batch, ErrorAnalysis
from distlenet.training.meter import Meter, Metrics
from distlenet.training.outline import TaskOutline


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
    model.eval()
    try:
        for batch in batches:
            data = task.transform(batch.data, None)
            with context.autocast():
                result = outline.loss(model, data)
            meter.update(outline.values(result, data))
            if analysis is not None:
                analysis.update(result.outputs, data, batch.indices)
    finally:
        model.train()
    metrics = meter.total()  # collective, host sync
    if metrics.count != expected:
        raise RuntimeError(f"evaluation counted {metrics.count} samples of a set of {expected}")
    return metrics
