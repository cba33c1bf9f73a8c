"""The evaluations of a training run: of the validation set and of the test set."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from distlenet.data.loader import EvaluationLoader
from distlenet.distributed.collectives import any_rank
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import Preemption
from distlenet.task import Batch
from distlenet.tracking.base import TEST_FILE
from distlenet.training.evaluation import evaluate
from distlenet.training.meter import Metrics
from distlenet.training.outline import TaskOutline
from distlenet.utils.errors import UserError, describe_error, warn
from distlenet.utils.eval_mode import eval_mode
from distlenet.utils.files import replace_text


class EvaluationStopped(Exception):
    """A rank has a stop request. Raised on every rank after the same batch."""


class Evaluator:
    """Evaluates the splits of a task, ``loaders`` by name, as one rank."""

    stop_check_interval = 16  # batches between two checks whether a rank has a stop request

    def __init__(
        self,
        outline: TaskOutline,
        loaders: Mapping[str, EvaluationLoader],
        context: DistributedContext,
        preemption: Preemption,
        run_dir: Path,
    ) -> None:
        self.outline, self.loaders, self.context, self.preemption = outline, loaders, context, preemption
        self.path = run_dir / TEST_FILE

    def evaluate(self, split: str, model: nn.Module, step: int, analyse: bool = False) -> Metrics:
        """Return the metrics of the bare module ``model`` on a split, after ``step`` steps. A collective.

        If ``analyse``, rank 0 also writes the task's error analysis. Raise EvaluationStopped if a rank has a stop
        request.
        """
        loader = self.loaders[split]
        analysis = self.outline.task.error_analysis(self.context.device) if analyse else None
        batches = self._interruptible(loader, step)
        metrics = evaluate(self.outline, model, batches, loader.samples, self.context, analysis)
        if analysis is not None:
            report = analysis.report()  # collective, host sync
            if self.context.env.rank == 0:
                self._write(report)
        return metrics

    def _interruptible(self, loader: EvaluationLoader, step: int) -> Iterator[Batch]:
        """Yield the batches; every ``stop_check_interval``, raise if a rank has a stop request. A collective."""
        for number, batch in enumerate(loader):
            self.context.watchdog.heartbeat(step)
            check = number < loader.batches_of_every_rank and (number + 1) % self.stop_check_interval == 0
            if check and any_rank(self.preemption.stop_requested, self.context.device):  # collective, host sync
                raise EvaluationStopped
            yield batch

    def _write(self, report: dict[str, object]) -> None:
        try:
            replace_text(self.path, json.dumps(report) + "\n")
        except OSError as error:  # training does not fail because of its report
            warn(f"{self.path}: cannot be written: {error.strerror or error}; the report has no confusion matrix")


@torch.no_grad()
def check_error_analysis(outline: TaskOutline, model: nn.Module, batch: Batch, context: DistributedContext) -> None:
    """Raise UserError if the task's error analysis does not accept its outputs: before the training, not after it."""
    task, name = outline.task, type(outline.task).__name__
    if (analysis := task.error_analysis(context.device)) is None:
        return
    data = batch.inputs(task)
    with eval_mode(model), context.autocast():
        outputs = outline.loss(model, data).outputs
    try:
        analysis.update(outputs, data, batch.indices)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = describe_error(error)
        raise UserError(
            f"{name}.error_analysis: does not accept the outputs of {name}.loss: {reason}; return None from it"
        ) from error
