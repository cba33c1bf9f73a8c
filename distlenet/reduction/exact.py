"""Gradients summed without rounding: the same bits for every number of ranks."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.buffers import BufferAverage
from distlenet.reduction.gradients import MeanFactors, group_by_size, in_memory_order
from distlenet.reduction.reducer import ExampleLoss, MicroBatch, ReductionResult, ReductionStep, T, mark_nonfinite
from distlenet.reduction.shared_memory import AllReduce
from distlenet.task import Data
from distlenet.utils.clock import Clock
from distlenet.utils.errors import UserError
from distlenet.utils.nested import count_samples, select_samples

CHUNK = {"cpu": 1 << 18}
"""Elements of gradients that are converted at once: on a CPU, these should fit in a cache."""


class ExactReducer:
    """The same bits for every number of ranks.

    Position p of a global batch belongs to virtual shard p % V, whatever the world size W; a rank has the V/W shards
    congruent to its rank, one micro-batch each (some ranks have one fewer if W does not divide V, which
    ``distributed.allow_uneven_batches`` permits). The gradient of each shard is computed separately, by the same
    kernels on the same shapes everywhere, then rounded to multiples of 2**-40 (9e-13) and summed without rounding (see
    ``distlenet.utils.exact_sums``): on the rank, then over ranks in one float64 all-reduce.
    """

    capture_after = 3  # steps: they create the state of optimizer, cuBLAS and NCCL
    GRID_BITS = 40
    SUM_BITS = 12  # the sum over all shards stays below 2**12, half of what float64 holds exactly on this grid

    def __init__(
        self,
        model: nn.Module,
        env: DistributedEnvironment,
        virtual_shards: int,
        micro_batch_size: int,
        check_finite: bool,
        all_reduce: AllReduce = dist.all_reduce,
        weighted: bool = False,
    ) -> None:
        """Reduce the gradients of ``model``; ``check_finite`` includes them in ``ReductionResult.nonfinite``.

        ``weighted`` losses divide by the sum of their weights.
        Raise UserError for parameters that are not float32.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if odd := [name for name, p in named if p.dtype != torch.float32 or torch.empty_like(p).stride() != p.stride()]:
            raise UserError(
                f"distributed.reduction=exact: needs dense float32 parameters, but {odd[0]} is not; change it, or give "
                "distributed.reduction=ddp"
            )
        self.buffers = BufferAverage(model, virtual_shards, all_reduce)
        self.model, self.env, self.all_reduce, self.check_finite = model, env, all_reduce, check_finite
        self.virtual_shards, self.micro_batch_size = virtual_shards, micro_batch_size
        self.micro_batches_per_rank = len(range(env.rank, virtual_shards, env.world_size))
        self.parameters = [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        # A shard's gradient beyond ±limit would make the sum inexact. Multiplied by 2**128/limit it overflows float32
        # to infinity, so a multiplication finds it, and infinity stays visible in the sum on every rank.
        limit_bits = self.SUM_BITS - math.ceil(math.log2(virtual_shards))
        self.limit = 2.0**limit_bits
        self.to_bound = 2.0 ** (128 - limit_bits)
        self.to_grid = 2.0**self.GRID_BITS / self.to_bound
        device = self.parameters[0].device
        self.clock, self.factors = Clock(device), MeanFactors(device)
        count = sum(self.sizes)
        self.exchanged = torch.zeros(count + weighted + 1, dtype=torch.float64, device=device)
        self.sum, self.flag = self.exchanged[:count], self.exchanged[-1]
        self.weight = self.exchanged[count] if weighted else None
        chunk = CHUNK.get(device.type, 1 << 24)
        double = torch.empty(min(chunk, count), dtype=torch.float64, device=device)
        # Parameters whose gradients are added at once; for each group, parts of its sum, each with temporary memory.
        self.groups = list(group_by_size(self.parameters, chunk))
        totals = self.sum.split([sum(parameter.numel() for parameter in group) for group in self.groups])
        self.chunks = [[(part, double[: len(part)]) for part in total.split(chunk)] for total in totals]

    def warm_up(self, example_loss: ExampleLoss) -> None:
        """Do nothing: the order of additions does not matter."""

    def reset(self, example_loss: ExampleLoss) -> None:  # noqa: ARG002
        """Undo the changes of buffers; a step keeps no other state."""
        self.buffers.reset()

    def cap_micro_batch_size(self, limit: int) -> None:
        """Do nothing: a shard has the same size on any number of ranks."""

    def split(self, data: Data) -> list[MicroBatch]:
        """Split a rank's share into its virtual shards; in a short last batch there may be fewer."""
        rank, world_size, per_rank = self.env.rank, self.env.world_size, self.micro_batches_per_rank
        shards = (slice(k, None, per_rank) for k in range(min(per_rank, count_samples(data))))
        return [MicroBatch(rank + k * world_size, select_samples(data, shard)) for k, shard in enumerate(shards)]

    def map(self, function: Callable[[MicroBatch], T], micro_batches: list[MicroBatch]) -> list[T]:
        """Call ``function`` on each micro-batch."""
        return [function(micro_batch) for micro_batch in micro_batches]

    @contextmanager
    def step(self, global_size: int, stop: Tensor, time_in_graph: bool = False) -> Iterator[ReductionStep]:
        """Reduce one step. A collective."""
        self.flag.copy_(stop)
        if self.weight is not None:
            self.weight.zero_()
        self.buffers.begin()
        step = self.make_step(global_size, time_in_graph)
        yield step
        step.end()

    def make_step(self, global_size: int, time_in_graph: bool) -> "ExactStep":
        """Return the object of one step."""
        return ExactStep(self, global_size, time_in_graph)


class ExactStep(ReductionStep):
    """One step."""

    def __init__(self, reducer: ExactReducer, global_size: int, time_in_graph: bool) -> None:
        self.reducer, self.global_size, self.time_in_graph = reducer, global_size, time_in_graph
        self.has_partial_sum = False

    def micro_batches(self, data: Data) -> Iterator[MicroBatch]:
        """Yield the shards of this rank."""
        for micro_batch in self.reducer.split(data):
            yield micro_batch
            self.add_shard()
            self.reducer.buffers.add(micro_batch.number, count_samples(micro_batch.data))

    def backward(self, loss_sum: Tensor, weight_sum: Tensor | None = None) -> None:
        """Add the gradient of a shard."""
        self.reducer.flag.add_(loss_sum.detach(), alpha=0)  # NaN if the loss is not finite
        if weight_sum is not None and self.reducer.weight is not None:
            self.reducer.weight.add_(weight_sum)  # exact: the weights are multiples of 2**-20, in units of 2**k
        self.differentiate(loss_sum, self.reducer.factors[self.global_size, loss_sum.dtype])

    def differentiate(self, loss_sum: Tensor, factor: Tensor) -> None:
        """Compute the gradient of ``loss_sum`` * ``factor``, of one shard."""
        loss_sum.backward(gradient=factor)

    def add_shard(self) -> None:
        """Move the gradient of one shard into the exact sum."""
        reducer = self.reducer
        for group, chunks in zip(reducer.groups, reducer.chunks, strict=True):
            gradients = [in_memory_order(parameter) for parameter in group]
            if len(gradients) > 1:
                bounded = iter([torch.cat(gradients).mul_(reducer.to_bound)])
            else:
                bounded = (part.mul(reducer.to_bound) for part in gradients[0].split(len(chunks[0][0])))
            for part, (total, double) in zip(bounded, chunks, strict=True):
                units = part.mul_(reducer.to_grid).round_()  # integer multiples of the grid, exact in float32
                if self.has_partial_sum:
                    total.add_(double.copy_(units))
                else:
                    total.copy_(units)
            for parameter in group:
                parameter.grad = None
        self.has_partial_sum = True

    def end(self) -> None:
        """Sum over ranks, and set float32 gradients. A collective."""
        reducer, ready = self.reducer, self.reducer.clock.mark(self.time_in_graph)
        if not self.has_partial_sum:  # this rank has no samples
            reducer.sum.zero_()
        reducer.all_reduce(reducer.exchanged)
        reduced = reducer.clock.mark(self.time_in_graph)
        if reducer.weight is not None:
            reducer.sum.div_(reducer.weight / self.global_size)
        flat = reducer.sum.float().mul_(2.0**-reducer.GRID_BITS)  # a power of two: only float() rounds
        for parameter, gradient in zip(reducer.parameters, flat.split(reducer.sizes), strict=True):
            parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())  # as fused optimizers need it
        # Each gradient is below 2**12, so their sum is finite if all of them are. Infinity and NaN times 0 are NaN.
        flag = torch.add(reducer.flag, flat.sum(), alpha=0) if reducer.check_finite else reducer.flag
        change = reducer.buffers.reduce(self.global_size)
        self._result = ReductionResult(mark_nonfinite(flag, change, reducer.weight), ready, reduced, change)
