"""The records of a trainer: the run before its first step, measurements, and a summary."""

import os

import torch

from distlenet import __version__
from distlenet.config.loading import result_settings
from distlenet.config.schema import Config
from distlenet.data.sampler import GlobalBatchSampler
from distlenet.distributed.context import DistributedContext
from distlenet.reduction.reducer import Reducer
from distlenet.task import Task
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Record
from distlenet.tracking.wandb import wandb_mode
from distlenet.training.selection import Selection
from distlenet.training.state import TrainState
from distlenet.training.step_result import StepResult
from distlenet.training.throughput import Throughput


def run_info(
    config: Config,
    context: DistributedContext,
    task: Task,
    state: TrainState,
    sampler: GlobalBatchSampler,
    reducer: Reducer,
) -> Record:
    """Return what a tracker receives before the first step."""
    built_in = isinstance(task, ImageClassification)
    configured = built_in and type(task).model is ImageClassification.model
    return {
        "version": __version__,
        "run_id": state.run_id,
        "model": config.model.name if configured else type(task).__name__,
        "data": config.data.name if built_in else None,
        "unit": "images" if built_in else "samples",
        "step": state.step,
        "evaluated": state.evaluated,
        "restarts": state.restarts,
        "settings": result_settings(config.to_dict()),
        "skipped_steps": state.skipped,
        "epochs": config.train.epochs,
        "global_batch_size": config.train.global_batch_size,
        "micro_batches": reducer.micro_batches_per_rank,
        "micro_batch_size": reducer.micro_batch_size,
        "reduction": config.distributed.reduction,
        "wandb": wandb_mode(config.wandb.mode, os.environ),
        "train_count": sampler.samples,
        "steps_per_epoch": sampler.steps,
        **context.describe(),
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
