"""One optimizer step, and everything it changes."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distlenet.checkpoint.format import State
from distlenet.checkpoint.initial_weights import load_initial_weights
from distlenet.config.names import is_import_name
from distlenet.config.schema import Config
from distlenet.data.batched_dataset import ResidentBatch
from distlenet.distributed.context import DistributedContext
from distlenet.reduction.ddp import DdpReducer
from distlenet.task import Batch, Data, Task
from distlenet.training.cuda_graph import GraphedStep, gathered
from distlenet.training.device_step import DeviceStep
from distlenet.training.optimizers import check_optimizer_state, load_optimizer
from distlenet.training.schedules import make_schedule
from distlenet.training.step_result import StepResult
from distlenet.utils.errors import UserError, warn
from distlenet.utils.structure import check_same_structure

DIVERGENCE_HINT = "give a smaller optim.lr, a longer optim.warmup_steps or train.max_grad_norm, and check the data"


class TrainStep:
    """The device's part of a step, the learning-rate schedule and the stop flag; a call is one optimizer step."""

    def __init__(
        self, config: Config, context: DistributedContext, task: Task, total_steps: int, example: Data, samples: int
    ) -> None:
        """Build all parts; ``example`` is the transformed data of one sample. A collective.

        A step has at most ``samples`` samples of this rank.

        Raise UserError for settings that do not fit each other or the ranks, and for a task that breaks its contract.
        """
        if (config.optim.warmup_steps or 0) >= total_steps:
            raise UserError(
                f"optim.warmup_steps={config.optim.warmup_steps}: the run has {total_steps} steps; give fewer than that"
            )
        self.config, self.context = config, context
        self.on_device = DeviceStep(config, context, task, example, samples)
        self.graph: GraphedStep | None = None
        self.schedule = make_schedule(config.optim, self.on_device.optimizer, total_steps)
        self.stop = False

    def __call__(self, batch: Batch | ResidentBatch, step: int, stop: bool, want_grad_norm: bool = False) -> StepResult:
        """Take optimizer step ``step`` (from 0) on this rank's share of a global batch. A collective.

        ``stop`` means that this rank has a stop request. No host sync on a GPU, except with fp16 or
        ``train.on_nonfinite=skip``, for the capture of a CUDA graph, and if the GPU is ``DELAY`` steps behind.
        """
        parts, lrs = self.on_device, [float(lr) for lr in self.schedule.get_last_lr()]
        parts.inputs.set(step, batch.epoch, stop, lrs, batch.indices if parts.on_gpu else None)
        if self.graph is not None:
            result = self.graph.run(batch, step, want_grad_norm)
        else:
            result = parts.compute(gathered(batch, parts), partial(parts.seed, step), want_grad_norm)
        if result.taken:
            self.schedule.step()
        parts.meter.count(step, len(batch))
        self.stop |= result.stop if parts.flags is None else parts.flags.poll(step)
        return StepResult(lrs[0], self.stop, result.skipped, result.grad_norm, result.times)

    def load_initial_weights(self, path: str) -> Path:
        """Start from the weights in a file, not from the initial ones of the model; return the file. A collective."""
        parts = self.on_device
        file = load_initial_weights(parts.model, path)
        if parts.weight_average is not None:
            parts.weight_average.reset()
        return file

    def warm_up(self) -> None:
        """Prepare for the first step, after a checkpoint was loaded. A collective."""
        self.on_device.warm_up()
        if self.config.train.cuda_graph == "auto" and self.context.device.type == "cuda":
            if (reason := self._why_no_graph()) is None:
                self.graph = GraphedStep(self.on_device)
            elif self.context.env.rank == 0:
                warn(f"train.cuda_graph=auto: no graph, because {reason}")

    def _why_no_graph(self) -> str | None:
        """Return why a step on a GPU cannot be a CUDA graph, or None; the same on all ranks."""
        if self.context.backend != "nccl":
            return f"the collectives of distributed.backend={self.context.backend} run on the host"
        if self.on_device.scaler.is_enabled():
            return "with precision=fp16 the host must know whether a step was skipped"
        if self.on_device.flags is None:
            return "with train.on_nonfinite=skip, or an optimizer without fused=true, the host decides about each step"
        if self.config.model.compile:
            return "model.compile=true was not tested with it"
        if self.config.model.sync_batchnorm and self.config.distributed.reduction == "exact":
            return "with model.sync_batchnorm=true and distributed.reduction=exact, shards wait for each other"
        if self.config.distributed.find_unused_parameters and isinstance(self.on_device.reducer, DdpReducer):
            return "with distributed.find_unused_parameters=true, DistributedDataParallel waits for the GPU"
        if is_import_name(self.config.optim.schedule):
            return f"optim.schedule={self.config.optim.schedule} may change more than the learning rate"
        return None

    def check_finite(self) -> None:
        """Raise UserError, on every rank, if a parameter is not finite: no later step repairs it. A host sync."""
        named = dict(self.on_device.model.named_parameters())
        extremes = torch.stack([_extremes(parameter.detach()) for parameter in named.values()])
        finite = extremes.isfinite().all(dim=1).tolist()
        if names := [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]:
            raise UserError(f"{', '.join(names)}: no longer finite; {DIVERGENCE_HINT}")

    def close(self) -> None:
        """Release what the process group must not outlive."""
        if self.graph is not None:
            self.graph.close()

    def state_dict(self) -> State:
        """Return what a checkpoint holds of the step. A collective."""
        parts = self.on_device
        average = {} if parts.weight_average is None else {"ema": parts.weight_average.state_dict()}
        return {
            "model": parts.model.state_dict(),
            **average,
            "optimizer": parts.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": parts.scaler.state_dict(),
            "meter": parts.meter.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Load a saved state, of any number of ranks; the weights are loaded before. A collective.

        Raise KeyError or ValueError if its structure differs.
        """
        parts = self.on_device
        scaled = parts.scaler.is_enabled()
        check_optimizer_state(self.config.optim, parts.optimizer, scaled, state)
        if parts.weight_average is not None:
            if "ema" in state:
                parts.weight_average.load_state_dict(state["ema"])
            else:  # the run had none so far: it begins with the loaded weights
                parts.weight_average.reset()
        check_same_structure(state["meter"], parts.meter.state_dict(), "meter")  # collective
        if state["scaler"] and scaled:
            check_same_structure(state["scaler"], parts.scaler.state_dict(), "scaler")
        load_optimizer(self.config.optim, parts.optimizer, self.schedule, state)
        if state["scaler"]:  # empty if the run was not fp16 so far: then the loss scale starts anew
            parts.scaler.load_state_dict(state["scaler"])
        parts.meter.load_state_dict(state["meter"], self.context.env.rank)


def _extremes(tensor: Tensor) -> Tensor:
    """Return the smallest and the largest element, (2,), or NaN if one is NaN. No host sync.

    This reads the tensor once: ``isfinite`` makes several temporary tensors, and takes ten times as long on a CPU.
    """
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor.new_zeros(2)
