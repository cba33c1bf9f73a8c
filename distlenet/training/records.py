"""The records of a trainer: the run before its first step, measurements, and a summary."""

import os
from typing import TYPE_CHECKING

import torch

from distlenet import __version__
from distlenet.config.loading import result_settings
from distlenet.distributed.context import DistributedContext
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Record
from distlenet.tracking.wandb import wandb_mode
from distlenet.training.selection import Selection
from distlenet.training.starts import describe_restart
from distlenet.training.state import TrainState
from distlenet.training.step_result import StepResult
from distlenet.training.throughput import Throughput

if TYPE_CHECKING:
    from distlenet.training.trainer import Trainer  # which imports this module


def run_info(trainer: "Trainer") -> Record:
    """Return what a tracker receives before the first step."""
    config, task, state = trainer.config, trainer.task, trainer.state
    built_in = isinstance(task, ImageClassification)
    configured = built_in and type(task).model is ImageClassification.model
    return {
        "version": __version__,
        "run": trainer.run_dir.name,
        "run_id": state.run_id,
        "model": config.model.name if configured else type(task).__name__,
        "data": config.data.name if built_in else None,
        "data_source": trainer.data_source,
        "unit": "images" if built_in else "samples",
        "step": state.step,
        "steps": trainer.total_steps,
        "evaluated": state.evaluated,
        "complete": trainer.complete,
        "stopped_early": trainer.selection.stops(state.best),
        "restart": describe_restart(),
        "restarts": state.restarts,
        "resumed_from": trainer.resumed_from and str(trainer.resumed_from),
        "initialised_from": trainer.initialised_from and str(trainer.initialised_from),
        "settings": result_settings(config.to_dict()),
        "skipped_steps": state.skipped,
        "epochs": config.train.epochs,
        "global_batch_size": config.train.global_batch_size,
        "micro_batches": trainer.reducer.micro_batches_per_rank,
        "micro_batch_size": trainer.reducer.micro_batch_size,
        "reduction": config.distributed.reduction,
        "wandb": wandb_mode(config.wandb.mode, os.environ),
        "train_count": trainer.sampler.samples,
        "steps_per_epoch": trainer.sampler.steps,
        "hosts": list(trainer.throughput.hosts),
        **trainer.context.describe(),
    }


def measurements(
    throughput: Throughput, scaler: torch.amp.GradScaler, result: StepResult, skipped_steps: int
) -> Record:
    """Return what a training record holds besides loss and metrics. A collective, then a host sync."""
    record = throughput.window()
    if result.grad_norm is not None:
        record["grad_norm"] = float(result.grad_norm)  # host sync
    if skipped_steps:
        record["skipped_steps"] = skipped_steps
    if scaler.is_enabled():
        record["loss_scale"] = scaler.get_scale()
    if throughput.device.type == "cuda":
        record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(throughput.device) / 2**30
    return record


def summary(
    state: TrainState, selection: Selection, throughput: Throughput, start_s: float, context: DistributedContext
) -> Record:
    """Return the results of a run that reached its end."""
    progress = {"epochs": state.epoch, "steps": state.step, "skipped_steps": state.skipped, "restarts": state.restarts}
    times = {"train_images_per_s": throughput.mean(), "train_s": throughput.seconds, "start_s": start_s}
    selected: Record = {"stopped_early": selection.stops(state.best)}
    if selection.best_by is not None and (best := state.best.get(selection.best_by)) and best.step:
        selected |= {"best_by": selection.best_by, "best_value": best.value, "best_step": best.step}
    return {**state.val, **state.test, **selected, **progress, **times, **context.describe()}
