"""One optimizer step, and everything it changes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distlenet.checkpoint.format import State
from distlenet.config.schema import Config
from distlenet.distributed.collectives import any_rank
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.device import make_scaler
from distlenet.distributed.preemption import StopFlag
from distlenet.reduction.factory import make_reducer
from distlenet.reduction.reducer import ReductionResult
from distlenet.task import Batch, Data, Task
from distlenet.training.cuda_graph import GraphedStep, is_capturing
from distlenet.training.meter import Meter
from distlenet.training.nonfinite_guard import NonfiniteGuard
from distlenet.training.optimizers import check_optimizer_state, load_optimizer, make_optimizer, make_schedule
from distlenet.training.step_result import DeviceResult, StepResult
from distlenet.utils.errors import UserError, warn
from distlenet.utils.keyed_random import seed_micro_batch
from distlenet.utils.nested import map_tensors
from distlenet.utils.structure import check_same_structure

DIVERGENCE_HINT = "give a smaller optim.lr, a longer optim.warmup_steps or train.max_grad_norm, and check the data"


class TrainStep:
    """Model, optimizer, schedule, loss scaler, reducer and meter; a call is one optimizer step."""

    def __init__(self, config: Config, context: DistributedContext, task: Task, total_steps: int) -> None:
        """Build all parts. Raise UserError for settings that do not fit each other or the ranks. A collective."""
        self.config, self.context, self.task, self.device = config, context, task, context.device
        if (config.optim.warmup_steps or 0) >= total_steps:
            raise UserError(
                f"optim.warmup_steps={config.optim.warmup_steps}: the run has {total_steps} steps; give fewer than that"
            )
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = task.model().to(self.device)
        self.scaler = make_scaler(context.precision, self.device)
        self.optimizer = make_optimizer(config.optim, self.model, loss_scaling=self.scaler.is_enabled())
        self.schedule = make_schedule(config.optim, self.optimizer, total_steps)
        self.autocast = context.autocast()
        self.reducer = make_reducer(config, self.model, context.env, check_finite=not self.scaler.is_enabled())
        deferred = self.device.type == "cuda" and config.train.on_nonfinite == "stop"
        self.guard = NonfiniteGuard(self.optimizer, self.device, deferred, self.scaler.is_enabled())
        self.meter = Meter(task.metric_names, self.device)
        self.stop_flag = StopFlag(self.device)
        self.stop_input = torch.zeros((), device=self.device)
        self.step_input = torch.zeros((), dtype=torch.int64, device=self.device)
        self.graph: GraphedStep | None = None

    def __call__(self, batch: Batch, step: int, stop: bool, want_grad_norm: bool = False) -> StepResult:
        """Take optimizer step ``step`` (from 0) on this rank's share of a global batch. A collective.

        ``stop`` means that this rank was asked to stop. No host sync on a GPU, except with fp16 or
        ``train.on_nonfinite=skip``.
        """
        lr = float(self.schedule.get_last_lr()[0])
        scale = self.scaler.get_scale()  # host sync, with fp16 only
        self.stop_input.fill_(stop)
        self.step_input.fill_(step)
        run = self.compute if self.graph is None else self.graph.run
        result = run(batch, step, want_grad_norm)
        if not result.skipped and self.scaler.get_scale() >= scale:  # a smaller scale: an overflow, no step was taken
            self.schedule.step()
        reduction = result.reduction
        stop = self.stop_flag.poll(reduction.stop)
        return StepResult(lr, stop, result.skipped, result.grad_norm, reduction.gradient_ready, reduction.reduced)

    def compute(self, batch: Batch, step: int, want_grad_norm: bool) -> DeviceResult:
        """Run the part of a step that a CUDA graph can capture."""
        data = self.task.transform(batch.data, batch.keys)
        values = []
        with self.reducer.step(batch.global_size, self.stop_input) as reduction:  # collective
            for micro_batch in reduction.micro_batches(data):
                self.seed(step, micro_batch.number)
                with self.autocast:
                    losses, outputs = self.task.loss(self.reducer.model, micro_batch.data)
                reduction.backward(self.scaler.scale(losses.sum()))
                values.append(values_per_sample(self.task, losses, outputs, micro_batch.data))
        return self.apply(reduction.result, torch.cat(values, 1), want_grad_norm)

    def apply(self, reduction: ReductionResult, values: Tensor, want_grad_norm: bool) -> DeviceResult:
        """Clip the gradients and take the step, unless something is not finite."""
        nonfinite, grad_norm, scaled = reduction.nonfinite, None, self.scaler.is_enabled()
        want_grad_norm |= self.config.train.max_grad_norm is not None or is_capturing(self.device)
        if want_grad_norm and not scaled:
            grad_norm = self.clip_gradients()
            nonfinite = nonfinite | ~grad_norm.isfinite()
        skipped = self.guard.should_skip(nonfinite, self.step_input)  # host sync, unless deferred
        if not skipped:
            if want_grad_norm and scaled:  # an overflow is expected, and unscaling must be followed by a step
                grad_norm = self.clip_gradients()
            self.meter.update(values)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return DeviceResult(reduction, grad_norm, skipped)

    def clip_gradients(self) -> Tensor:
        """Clip to ``train.max_grad_norm``, if set, and return the norm before, a scalar. No host sync."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.config.train.max_grad_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.config.train.max_grad_norm, norm)
        return norm

    def seed(self, step: int, micro_batch: int) -> None:
        """Seed the generator of the device, for dropout, by step and micro-batch."""
        if not is_capturing(self.device):  # a captured step is seeded before each replay
            seed_micro_batch(self.device, self.config.seed, step, micro_batch)

    def warm_up(self, empty_data: Data) -> None:
        """Prepare for the first step, after a checkpoint was loaded. A collective.

        ``empty_data`` holds the transformed samples of an empty batch.
        """
        self.empty_data = empty_data
        self.reducer.warm_up(self.empty_loss)
        if self.config.train.cuda_graph == "auto":
            reason = self.why_no_graph()
            if any_rank(reason is not None, self.device):  # with unequal shares, ranks may differ; a collective
                if self.context.env.rank == 0:
                    warn(f"train.cuda_graph=auto: no graph, because {reason or 'another rank cannot have one'}")
            else:
                seed = partial(self.seed, micro_batch=self.context.env.rank)  # a graph has one micro-batch
                size = self.config.train.global_batch_size
                self.graph = GraphedStep(self.compute, seed, self.reset, self.optimizer, size, self.device)

    def empty_loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a batch without samples, a scalar."""
        with self.autocast:
            return self.task.loss(model, self.empty_data)[0].sum()

    def why_no_graph(self) -> str | None:
        """Return why a step of this rank cannot be a CUDA graph, or None."""
        if self.device.type != "cuda":
            return "there is no GPU"
        if self.context.backend != "nccl":
            return f"the collectives of distributed.backend={self.context.backend} run on the host"
        if self.scaler.is_enabled():
            return "with precision=fp16 the host must know whether a step was skipped"
        if not self.guard.deferred:
            return "with train.on_nonfinite=skip the host must know whether a step was skipped"
        if self.reducer.micro_batches_per_rank > 1:
            return "a rank has several micro-batches per step, each with its own random numbers"
        return None

    def reset(self) -> None:
        """Recover from a step that an exception ended. A collective."""
        self.optimizer.zero_grad(set_to_none=True)
        self.reducer.reset(self.empty_loss)

    def recompute(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute this rank's share of a step again, changing nothing.

        Return the losses (n,) in the order of ``batch.indices`` and the gradients by parameter name. Not a collective.
        """
        named = dict(self.model.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        losses = torch.zeros(len(batch), device=self.device)
        data = self.task.transform(batch.data, batch.keys)
        positions = torch.arange(len(batch), device=self.device)
        for number, (part, at) in self.reducer.split((data, positions)):
            self.seed(step, number)
            with self.autocast:
                part_losses, _ = self.task.loss(self.model, part)
            scaled = self.scaler.scale(part_losses.sum() / batch.global_size)
            # Not backward(): its hooks would start a collective, and the other ranks are elsewhere.
            part_gradients = torch.autograd.grad(scaled, list(named.values()), allow_unused=True)
            for name, gradient in zip(named, part_gradients, strict=True):
                if gradient is not None:
                    gradients[name].add_(gradient)
            losses[at] = part_losses.detach().float()
        for name, buffer in self.model.named_buffers():  # such as the statistics of a BatchNorm
            buffer.copy_(buffers[name])
        return losses, gradients

    def check_finite(self) -> None:
        """Raise UserError, on every rank, if a parameter is not finite: no later step repairs it. A host sync."""
        named = dict(self.model.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
        if names := [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]:
            raise UserError(f"{', '.join(names)}: no longer finite; {DIVERGENCE_HINT}")

    def close(self) -> None:
        """Release what the process group must not outlive."""
        if self.graph is not None:
            self.graph.close()

    def state_dict(self) -> State:
        """Return what a checkpoint holds of the step. A collective."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Load a saved state, of any number of ranks; the weights are loaded before. A collective.

        Raise ValueError if its structure differs.
        """
        check_optimizer_state(self.config.optim, self.model, self.scaler.is_enabled(), state)
        check_same_structure(state["meter"], self.meter.state_dict(), "meter")  # collective
        if state["scaler"] and self.scaler.is_enabled():
            check_same_structure(state["scaler"], self.scaler.state_dict(), "scaler")
        load_optimizer(self.optimizer, self.schedule, state)
        if state["scaler"]:  # empty if the run was not fp16 so far: then the loss scale starts anew
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], self.context.env.rank)


def values_per_sample(task: Task, losses: Tensor, outputs: Any, data: Data) -> Tensor:
    """Return loss and metrics per sample: (1 + number of metrics, n), of the dtype of ``losses``. No host sync."""
    metrics = task.metrics(map_tensors(Tensor.detach, outputs), data)
    losses = losses.detach()
    return torch.stack([losses, *(metrics[name].to(losses.dtype) for name in task.metric_names)])
