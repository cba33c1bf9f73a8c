"""Gradient reduction by one all-reduce of one buffer: on a GPU for small networks, on CPUs in shared memory for all."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.buffers import BufferAverage
from distlenet.reduction.gradients import MeanFactors, fill_unused, in_memory_order
from distlenet.reduction.micro_batches import ConsecutiveMicroBatches
from distlenet.reduction.reducer import ExampleLoss, MicroBatch, ReductionResult, ReductionStep, mark_nonfinite
from distlenet.reduction.shared_memory import AllReduce
from distlenet.task import Data
from distlenet.utils.clock import Clock
from distlenet.utils.nested import count_samples

MAX_BYTES = 2**20
"""The size of the first bucket of DistributedDataParallel: up to it, a backward pass has nothing to overlap with."""


def fits_flat_buffer(model: nn.Module, all_reduce: AllReduce) -> bool:
    """Return whether all trainable parameters are dense, in float32, and together at most ``MAX_BYTES``.

    In shared memory they may be larger: there, ranks wait for each other in an all-reduce, and nothing overlaps.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dense = all(p.dtype == torch.float32 and torch.empty_like(p).stride() == p.stride() for p in parameters)
    small = sum(parameter.nbytes for parameter in parameters) <= MAX_BYTES
    return dense and (small if on_gpu(model) else all_reduce is not dist.all_reduce)


def on_gpu(model: nn.Module) -> bool:
    """Return whether the parameters are on a GPU."""
    return next(model.parameters()).device.type == "cuda"


class FlatReducer(ConsecutiveMicroBatches):
    """Gradients, stop flag and sum of weights in one float32 buffer.

    DistributedDataParallel copies each gradient to its bucket by a separate kernel, which for a small network on a GPU
    takes longer than the computation. On CPUs, its Python code takes longer than one copy: compare ``ddp`` with ``ddp,
    wrapped`` of benchmarks/reduction_cost.py.
    """

    capture_after = 3  # steps: they create the state of optimizer, cuBLAS and NCCL

    def __init__(
        self,
        model: nn.Module,
        env: DistributedEnvironment,
        accumulation_steps: int,
        micro_batch_size: int,
        all_reduce: AllReduce,
        weighted: bool,
        find_unused: bool,
    ) -> None:
        """Reduce the gradients of ``model``; the arguments are those of ``DdpReducer``."""
        super().__init__(env.rank, accumulation_steps, micro_batch_size)
        self.model, self.weighted, self.find_unused = model, weighted, find_unused
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.sizes = [parameter.numel() for parameter in self.parameters.values()]
        device = next(iter(self.parameters.values())).device
        self.all_reduce, self.clock, self.buffers = all_reduce, Clock(device), BufferAverage(model, 1, all_reduce)
        self.factors = MeanFactors(device)
        self.flat = torch.empty(sum(self.sizes) + 1 + weighted, device=device)  # the gradients of a step are its parts

    def warm_up(self, example_loss: ExampleLoss) -> None:
        """Do nothing: no state depends on the first step."""

    def reset(self, example_loss: ExampleLoss) -> None:  # noqa: ARG002
        """Undo the changes of buffers; a step keeps no other state."""
        self.buffers.reset()

    @contextmanager
    def step(self, global_size: int, stop: Tensor, time_in_graph: bool = False) -> Iterator[ReductionStep]:
        """Reduce one step. A collective."""
        self.buffers.begin()
        step = _FlatStep(self, global_size, stop, time_in_graph)
        yield step
        step.end()


class _FlatStep(ReductionStep):
    def __init__(self, reducer: FlatReducer, global_size: int, stop: Tensor, time_in_graph: bool) -> None:
        self.reducer, self.global_size, self.flag, self.time_in_graph = reducer, global_size, stop, time_in_graph
        self.weight: Tensor | None = None  # of this rank

    def micro_batches(self, data: Data) -> Iterator[MicroBatch]:
        for micro_batch in self.reducer.split(data):
            yield micro_batch
            self.reducer.buffers.add(0, count_samples(micro_batch.data))

    def backward(self, loss_sum: Tensor, weight_sum: Tensor | None = None) -> None:
        self.flag = torch.add(self.flag, loss_sum.detach(), alpha=0)  # NaN if the loss is not finite
        factor = self.reducer.factors[self.global_size, loss_sum.dtype]
        if weight_sum is not None:
            weight = weight_sum * factor
            self.weight = weight if self.weight is None else self.weight + weight
        loss_sum.backward(gradient=factor)

    def end(self) -> None:
        """Sum over ranks. A collective."""
        reducer, ready = self.reducer, self.reducer.clock.mark(self.time_in_graph)
        parameters = reducer.parameters
        has_samples = any(parameter.grad is not None for parameter in parameters.values())
        fill_unused(parameters, allowed=reducer.find_unused or not has_samples)
        rest = [self.flag.view(1)]
        if reducer.weighted:
            rest.append(torch.zeros_like(rest[0]) if self.weight is None else self.weight.float().view(1))
        flat = torch.cat([*(in_memory_order(p) for p in parameters.values()), *rest], out=reducer.flat)
        reducer.all_reduce(flat)  # collective
        reduced = reducer.clock.mark(self.time_in_graph)
        *gradients, flag = flat.split([*reducer.sizes, len(rest)])
        weight = flag[1] if reducer.weighted else None
        if weight is not None:
            torch._foreach_div_(gradients, weight)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())
        change = reducer.buffers.reduce(self.global_size)  # collective
        self._result = ReductionResult(mark_nonfinite(flag[0], change, weight), ready, reduced, change)
