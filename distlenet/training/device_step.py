"""The part of an optimizer step that runs on the device, and that a CUDA graph can capture."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distlenet.config.schema import Config
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.device import make_scaler
from distlenet.reduction.buffers import unchanged_buffers
from distlenet.reduction.factory import make_reducer
from distlenet.reduction.global_statistics import use_global_statistics
from distlenet.reduction.lockstep import connect
from distlenet.reduction.reducer import MicroBatch, ReductionResult
from distlenet.task import Batch, Data, Task, new_model
from distlenet.training.compilation import compile_model
from distlenet.training.meter import DeferredMeter, Meter
from distlenet.training.optimizers import check_optimizer, make_optimizer
from distlenet.training.outline import outline_of
from distlenet.training.parameter_groups import parameter_groups
from distlenet.training.profiling import phase
from distlenet.training.step_flags import StepFlags
from distlenet.training.step_inputs import StepInputs
from distlenet.training.step_result import DeviceResult, StepTimes
from distlenet.training.weight_average import WeightAverage
from distlenet.utils.clock import Clock, Mark
from distlenet.utils.keyed_random import default_generator, seed_micro_batch

Seed = Callable[[int], None]
"""Seeds the device's generator, for example for dropout, for the micro-batch with this number."""


class RankShare(NamedTuple):
    """A rank's share of a step, computed again."""

    losses: Tensor  # (n,), in the order of ``Batch.indices``
    weights: Tensor | None  # (n,); None without weights
    gradients: dict[str, Tensor]  # by the name of the parameter; with weights, not yet divided by the sum of these


class DeviceStep:
    """Model, average of its weights, loss scaler, optimizer, reducer, meter, and the inputs and flags of steps."""

    def __init__(self, config: Config, context: DistributedContext, task: Task, example: Data, samples: int) -> None:
        """Build all parts; ``example`` is the transformed data of one sample. A collective.

        A step has at most ``samples`` samples of this rank.

        Raise UserError for settings that the model or the ranks do not allow, and for a task that breaks its contract.
        """
        self.task, self.device, self.autocast = task, context.device, context.autocast()
        self.seed_value, self.max_grad_norm = config.seed, config.train.max_grad_norm
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.model = new_model(task).to(self.device).train()  # also what a library returns in evaluation mode
        if config.model.sync_batchnorm:
            use_global_statistics(self.model)
        self.example = example
        self.outline = outline_of(task, self.model, example, self.autocast)
        decay = config.train.ema_decay
        self.weight_average = None if decay is None else WeightAverage(self.model, decay)
        self.scaler = make_scaler(context.precision, self.device)
        scaled = self.scaler.is_enabled()
        self.optimizer = make_optimizer(config.optim, parameter_groups(task, self.model), loss_scaling=scaled)
        check_optimizer(config.optim, self.optimizer)
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained_model = compile_model(self.model, self.device) if config.model.compile else self.model
        self.reducer = make_reducer(config, trained_model, context.env, not scaled, self.outline.weighted)
        skips_on_device = scaled or getattr(self.optimizer, "_step_supports_amp_scaling", False)  # if it is fused
        self.on_gpu = self.device.type == "cuda"
        self.inputs = StepInputs(self.device, len(self.optimizer.param_groups), samples if self.on_gpu else 0)
        self.flags: StepFlags | None = None  # None: the host waits for the flag of each step
        metrics, weighted = self.outline.metric_names, self.outline.weighted
        self.meter = Meter(metrics, self.device, weighted)
        if self.on_gpu and config.train.on_nonfinite == "stop" and skips_on_device:
            self.flags = StepFlags(self.optimizer, self.device, loss_scaling=scaled)
            self.meter = DeferredMeter(metrics, self.device, weighted, samples)
        self.lrs_on_device = self.flags is not None and not scaled
        self.clock = Clock(self.device)
        self.loss_scale: float | None = None  # after the last step

    def compute(self, batch: Batch, seed: Seed, want_grad_norm: bool) -> DeviceResult:
        """Compute the gradient of a global batch and take the step that ``inputs`` describes. A collective.

        ``seed`` is called before each micro-batch. A CUDA graph is timed if it computes the norm of the gradient.
        """
        want_grad_norm |= self.max_grad_norm is not None
        begin = self.clock.mark(want_grad_norm)
        with phase("transform"):
            data = batch.inputs(self.task)

        def compute(micro_batch: MicroBatch) -> Tensor:
            seed(micro_batch.number)
            with phase("forward"), self.autocast:
                result = self.outline.loss(self.reducer.model, micro_batch.data)
            loss_sum, weight_sum = self.outline.sums(result)
            with phase("backward"):
                reduction.backward(self.scaler.scale(loss_sum), weight_sum)  # the last is a collective
            return self.outline.values(result, micro_batch.data)

        with self.reducer.step(batch.global_size, self.inputs.stop, want_grad_norm) as reduction:
            values = reduction.map(compute, data)
        return self._apply(reduction.result, self.outline.join(values, self.device), want_grad_norm, begin)

    def _apply(self, reduction: ReductionResult, values: Tensor, want_grad_norm: bool, begin: Mark) -> DeviceResult:
        """Clip the gradients and take the step, unless something is not finite."""
        flag, grad_norm, scaled = reduction.flag, None, self.scaler.is_enabled()
        if want_grad_norm and not scaled:
            grad_norm = self._clip_gradients()
            flag = torch.add(flag, grad_norm, alpha=0)  # NaN if the norm is not finite
        stop = skipped = taken = False
        if self.flags is not None:
            self.flags.record(flag, self.inputs.slot)
        else:
            value = float(flag)  # host sync
            stop, skipped = value > 0, math.isnan(value)
        if not skipped:
            if want_grad_norm and scaled:  # an overflow is expected, and unscaling must be followed by a step
                grad_norm = self._clip_gradients()
            self.meter.update(values, self.inputs.slot)
            taken = self._take_step()
            if taken and self.weight_average is not None:
                self.weight_average.update()
            if taken and reduction.buffer_change is not None:
                skip = None if self.flags is None else self.flags.found_inf
                self.reducer.buffers.apply(reduction.buffer_change, skip)
        for parameter in self.parameters:  # as Optimizer.zero_grad, which takes ten times as long
            parameter.grad = None
        times = StepTimes(begin, reduction.gradient_ready, reduction.reduced, self.clock.mark(want_grad_norm))
        return DeviceResult(grad_norm, stop, skipped, taken, times)

    def _take_step(self) -> bool:
        """Let the optimizer take its step; return False if the loss scaler skipped it. With fp16, host syncs."""
        if not self.scaler.is_enabled():
            with self._lrs_on_device():
                self.optimizer.step()
            return True
        before = self.scaler.get_scale() if self.loss_scale is None else self.loss_scale  # host sync, once
        self.scaler.step(self.optimizer)  # host sync, unless the optimizer is fused
        self.scaler.update()
        self.loss_scale = self.scaler.get_scale()  # host sync
        return self.loss_scale >= before  # a smaller scale means an overflow

    @contextmanager
    def _lrs_on_device(self) -> Iterator[None]:
        """Let a fused optimizer read the learning rates from ``inputs``, as a CUDA graph must: in float32."""
        groups, before = self.optimizer.param_groups if self.lrs_on_device else [], []
        for lr, group in zip(self.inputs.lrs, groups, strict=bool(groups)):
            on_device = {"lr": lr, "capturable": True}  # SGD neither has nor needs "capturable"
            before.append({key: group[key] for key in on_device if key in group})
            group.update({key: on_device[key] for key in before[-1]})
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)

    def _clip_gradients(self) -> Tensor:
        """Clip to ``train.max_grad_norm``, if set, and return the norm before, a scalar. No host sync."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        return norm

    def evaluated_model(self) -> nn.Module:
        """Return the bare module for an evaluation: with the averaged weights, if there are any."""
        return self.model if self.weight_average is None else self.weight_average.evaluated_model()

    def seed(self, step: int, micro_batch: int) -> None:
        """Seed the generator of the device, for dropout, by step and micro-batch."""
        seed_micro_batch(default_generator(self.device), self.seed_value, step, micro_batch)

    def warm_up(self) -> None:
        """Prepare the reducer, after a checkpoint was loaded. A collective."""
        self.loss_scale = None
        self.reducer.warm_up(self._example_loss)

    def reset(self) -> None:
        """Recover from a step that an exception ended. A collective."""
        self.optimizer.zero_grad(set_to_none=True)
        self.reducer.reset(self._example_loss)

    def _example_loss(self, model: nn.Module) -> Tensor:
        with self.autocast:
            return self.outline.loss(model, self.example).losses.sum()

    def recompute(self, batch: Batch, step: int) -> RankShare:
        """Compute this rank's share of a step again, changing nothing. A collective with ``model.sync_batchnorm``."""
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        gradients = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        losses, weights = torch.zeros(len(batch), device=self.device), torch.ones(len(batch), device=self.device)
        data = batch.inputs(self.task)

        def compute(micro_batch: MicroBatch) -> None:
            part, positions = micro_batch.data
            self.seed(step, micro_batch.number)
            with unchanged_buffers(self.model):
                with self.autocast:
                    result = self.outline.loss(self.model, part)
                scaled = self.scaler.scale(self.outline.sums(result)[0] / batch.global_size)
                # Not backward(): its hooks would start a collective, and the other ranks are elsewhere.
                part_gradients = torch.autograd.grad(connect(scaled), list(named.values()), allow_unused=True)
            for name, gradient in zip(named, part_gradients, strict=True):
                if gradient is not None:
                    gradients[name].add_(gradient)
            losses[positions] = result.losses.detach().float()
            if result.weights is not None:
                weights[positions] = result.weights

        self.reducer.map(compute, self.reducer.split((data, torch.arange(len(batch), device=self.device))))
        return RankShare(losses, weights if self.outline.weighted else None, gradients)
