"""Gradient reduction by DistributedDataParallel, with a stop flag in its all-reduce."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.buffers import BufferAverage, unchanged_buffers
from distlenet.reduction.gradients import fill_unused
from distlenet.reduction.micro_batches import ConsecutiveMicroBatches
from distlenet.reduction.reducer import ExampleLoss, MicroBatch, ReductionResult, ReductionStep, mark_nonfinite
from distlenet.reduction.shared_memory import AllReduce
from distlenet.reduction.wrapped_model import (
    NO_SAMPLES,
    CommHook,
    ModelWithStopFlag,
    sum_comm_hook,
    wrap,
    zero_of,
)
from distlenet.task import Data
from distlenet.utils.clock import Clock
from distlenet.utils.eval_mode import eval_mode
from distlenet.utils.nested import count_samples


class _ReadyMark:
    """The last time in a step that a gradient was complete."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.mark = clock, clock.mark()
        self.in_graph = False
        self.event: torch.cuda.Event | None = None

    def begin(self, in_graph: bool) -> None:
        """Begin a step; ``in_graph``: see ``Clock.mark``."""
        self.in_graph, self.event = in_graph, None

    def set(self, _: Tensor) -> None:
        """Mark the current moment, with one event for all micro-batches: the result of the step keeps it."""
        self.mark = self.clock.mark(self.in_graph, self.event)
        self.event = self.mark.event


class DdpReducer(ConsecutiveMicroBatches):
    """Floats, summed over ranks in the order that DistributedDataParallel and ``all_reduce`` choose."""

    capture_after = 11  # DistributedDataParallel times some of its first ten steps with events

    def __init__(
        self,
        model: nn.Module,
        env: DistributedEnvironment,
        accumulation_steps: int,
        micro_batch_size: int,
        all_reduce: AllReduce,
        compress: bool,
        weighted: bool,
        find_unused: bool,
    ) -> None:
        """Wrap ``model``; a rank takes ``accumulation_steps`` micro-batches of up to ``micro_batch_size`` samples.

        With ``compress``, gradients travel as bf16 through the process group. ``weighted`` losses divide by the sum of
        their weights. ``find_unused`` allows losses that do not depend on all parameters. A collective.
        """
        device = next(model.parameters()).device
        super().__init__(env.rank, accumulation_steps, micro_batch_size)
        self.bare_model, self.clock, self.buffers = model, Clock(device), BufferAverage(model, 1, all_reduce)
        self.comm_hook: CommHook | None = None
        self.loss_multiplier = env.world_size  # DistributedDataParallel divides by it, and so does bf16_compress_hook
        if compress:
            self.comm_hook = bf16_compress_hook
        elif all_reduce is not dist.all_reduce:
            self.comm_hook, self.loss_multiplier = sum_comm_hook(all_reduce), 1
        self.weighted, self.weights_in_bucket = weighted, weighted and not compress  # bf16 would round their sum
        self.find_unused = find_unused
        self.model = self._wrap(ModelWithStopFlag(model, device, self.weights_in_bucket, find_unused))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # The first parameter's gradient is the last one of a backward pass. The hook does not refer to the reducer:
        # the garbage collector does not see a hook's references, and the process group would never end.
        self.ready = _ReadyMark(self.clock)
        next(iter(self.parameters.values())).register_post_accumulate_grad_hook(self.ready.set)

    def _wrap(self, model: ModelWithStopFlag) -> DistributedDataParallel:
        self.flag, self.weight = model.flag, model.weight
        return wrap(model, self.find_unused, self.comm_hook)

    def warm_up(self, example_loss: ExampleLoss) -> None:
        """Run two steps on an example, and discard the gradients. A collective.

        After its first backward pass DistributedDataParallel reorders its buckets; the new order applies from the
        second forward pass on. With three or more ranks the position in a bucket decides in which order floats are
        added: a resumed run needs the order that an uninterrupted run has by then.
        """
        with eval_mode(self.bare_model), unchanged_buffers(self.bare_model):
            for _ in range(2):
                # In evaluation mode, the loss may not depend on all parameters.
                loss = example_loss(self.model) + self.flag * 0 + (0 if self.find_unused else zero_of(self.bare_model))
                (loss if self.weight is None else loss + self.weight * 0).backward()
        self.model.zero_grad(set_to_none=True)

    def reset(self, example_loss: ExampleLoss) -> None:
        """Wrap the model again: DistributedDataParallel would wait for the missing gradients. A collective."""
        model = self.model.module
        del self.model  # removes its hooks from the parameters
        self.buffers.reset()
        self.model = self._wrap(model)
        self.warm_up(example_loss)

    @contextmanager
    def step(self, global_size: int, stop: Tensor, time_in_graph: bool = False) -> Iterator[ReductionStep]:
        """Reduce one step. A collective."""
        self.buffers.begin()
        self.ready.begin(time_in_graph)
        step = _DdpStep(self, global_size, stop, time_in_graph)
        yield step
        step.end()


class _DdpStep(ReductionStep):
    def __init__(self, reducer: DdpReducer, global_size: int, stop: Tensor, time_in_graph: bool) -> None:
        self.reducer, self.global_size, self.stop, self.time_in_graph = reducer, global_size, stop, time_in_graph
        self.loss_factor = reducer.loss_multiplier / global_size
        self.weight = torch.zeros_like(stop, dtype=torch.float64) if reducer.weighted else None  # of this rank

    def micro_batches(self, data: Data) -> Iterator[MicroBatch]:
        micro_batches = self.reducer.split(data)
        for micro_batch in micro_batches[:-1]:
            with self.reducer.model.no_sync():
                yield micro_batch
            self.reducer.buffers.add(0, count_samples(micro_batch.data))
        if micro_batches:
            yield micro_batches[-1]
            self.reducer.buffers.add(0, count_samples(micro_batches[-1].data))
        else:  # the last backward pass is the collective
            self.backward(self.reducer.model(NO_SAMPLES), self.weight)

    def backward(self, loss_sum: Tensor, weight_sum: Tensor | None = None) -> None:
        loss = loss_sum * self.loss_factor
        # The gradient of the flag is ``stop``, or NaN if the loss is not finite.
        total = loss + self.reducer.flag * (self.stop + loss.detach() * 0)
        if weight_sum is not None:
            weight = weight_sum * self.loss_factor
            if self.reducer.weight is not None:
                total = total + self.reducer.weight * weight.float()
            elif self.weight is not None:
                self.weight += weight
        total.backward()

    def end(self) -> None:
        """Read what all ranks contributed: the last backward pass has reduced it."""
        flag, reduced = self.reducer.flag, self.reducer.clock.mark(self.time_in_graph)
        assert flag.grad is not None, "no backward in this step"
        fill_unused(self.reducer.parameters, self.reducer.find_unused)
        if self.reducer.find_unused:
            self._sum_flags()
        stop = flag.grad.clone()
        flag.grad = None
        if (weight := self._total_weight()) is not None:
            torch._foreach_div_([p.grad for p in self.reducer.parameters.values() if p.grad is not None], weight)
        change = self.reducer.buffers.reduce(self.global_size)
        self._result = ReductionResult(mark_nonfinite(stop, change, weight), self.reducer.ready.mark, reduced, change)

    def _sum_flags(self) -> None:
        """Sum what is not in a bucket with unused parameters. A collective."""
        gradients = [p.grad for p in (self.reducer.flag, self.reducer.weight) if p is not None and p.grad is not None]
        sums = torch.stack(gradients).double()
        dist.all_reduce(sums)  # collective
        torch._foreach_copy_(gradients, list((sums / self.reducer.loss_multiplier).unbind()))

    def _total_weight(self) -> Tensor | None:
        """Return the sum of the weights of all ranks, divided by the global batch size; None without weights."""
        parameter = self.reducer.weight
        if parameter is not None and parameter.grad is not None:
            weight = parameter.grad.clone()
            parameter.grad = None
            return weight
        if self.weight is None:
            return None
        dist.all_reduce(self.weight)  # collective, only with compression
        return (self.weight / dist.get_world_size()).float()
