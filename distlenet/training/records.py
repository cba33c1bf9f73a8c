"""What a trainer reports besides loss and metrics: the run before its first step, measurements, and a summary."""

import os
from typing import TYPE_CHECKING

import torch

from distlenet import __version__
from distlenet.tracking.base import Record
from distlenet.tracking.wandb import wandb_mode
from distlenet.training.train_step import StepResult

if TYPE_CHECKING:
    from distlenet.training.trainer import Trainer


def run_info(trainer: "Trainer") -> Record:
    """Return what a tracker receives before the first step."""
    config, state, sampler, reducer = trainer.config, trainer.state, trainer.sampler, trainer.train_step.reducer
    return {
        "version": __version__,
        "run": trainer.run_dir.name,
        "run_id": state.run_id,
        "hosts": list(trainer.throughput.hosts),
        "model": config.model.name,
        "data": config.data.name,
        "step": state.step,
        "steps": trainer.total_steps,
        "evaluated": state.evaluated,
        "complete": state.evaluated >= trainer.total_steps,
        "epochs": config.train.epochs,
        "global_batch_size": config.train.global_batch_size,
        "micro_batches": reducer.micro_batches_per_rank,
        "micro_batch_size": reducer.micro_batch_size,
        "reduction": config.distributed.reduction,
        "resumed_from": trainer.resumed_from and str(trainer.resumed_from),
        "wandb": wandb_mode(config.wandb.mode, os.environ),
        "train_count": sampler.samples,
        "data_source": trainer.data_source,
        "steps_per_epoch": sampler.steps,
        **trainer.context.describe(),
    }


def measurements(trainer: "Trainer", result: StepResult) -> Record:
    """Return what a training record holds besides loss and metrics. A collective, then a host sync."""
    record = trainer.throughput.window()
    if result.grad_norm is not None:
        record["grad_norm"] = float(result.grad_norm)  # host sync
    if trainer.train_step.scaler.is_enabled():
        record["loss_scale"] = trainer.train_step.scaler.get_scale()
    if trainer.device.type == "cuda":
        record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
    return record


def summary(trainer: "Trainer") -> Record:
    """Return the results of a run that reached its end."""
    state, speed = trainer.state, trainer.throughput
    progress = {"epochs": state.epoch, "steps": state.step, "skipped_steps": state.skipped, "restarts": state.restarts}
    times = {"train_images_per_s": speed.mean(), "train_s": speed.seconds, "start_s": trainer.start_s}
    return {**state.test, **progress, **times, **trainer.context.describe()}
