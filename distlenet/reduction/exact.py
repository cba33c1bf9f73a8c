"""Gradients added without rounding: the same bits for every number of ranks."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.preemption import StopFlag
from distlenet.reduction.micro_batching import Marks, MicroBatch
from distlenet.reduction.shared_memory import AllReduce
from distlenet.utils.errors import UserError


class ExactReducer:
    """The same bits for every number of ranks.

    Position p of a global batch belongs to virtual shard p % V, whatever the world size W; a rank has the V/W
    shards congruent to its rank, one micro-batch each (one fewer on some ranks, where W does not divide V and
    ``distributed.allow_uneven_batches`` allows it). Each shard's gradient is computed alone, by the same
    kernels on the same shapes everywhere, then rounded to multiples of 2**-40 (9e-13) and summed without
    rounding (see ``distlenet.utils.exact_sums``): on the rank, then over ranks in one float64 all-reduce.
    """

    GRID_BITS = 40
    SUM_BITS = 12  # the sum over all shards stays below 2**12, half of what float64 holds exactly at this grid

    def __init__(
        self,
        net: nn.Module,
        env: DistributedEnvironment,
        virtual_shards: int,
        micro_batch: int,
        watch: bool,
        all_reduce: AllReduce = dist.all_reduce,
    ) -> None:
        """Reduce the gradients of ``net``; ``watch`` for those that are not finite (fp16 expects some).

        Raises UserError for modules that mix the images of a micro-batch, and for parameters beyond float32.
        """
        for name, module in net.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UserError(
                    f"distributed.reduction=exact: {name} ({type(module).__name__}) computes statistics over a "
                    "micro-batch, which depend on how it is cut; use GroupNorm, or distributed.reduction=ddp"
                )
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        if odd := [name for name, p in named if p.dtype != torch.float32 or torch.empty_like(p).stride() != p.stride()]:
            raise UserError(
                f"distributed.reduction=exact: needs float32 parameters without gaps, but {odd[0]} is not; make it "
                "so, or give distributed.reduction=ddp"
            )
        self.model = net
        self.weight = 1
        self.marks = Marks()
        self.env, self.all_reduce = env, all_reduce
        self.micro_batch_size = micro_batch
        self.micro_batches_per_rank = len(range(env.rank, virtual_shards, env.world_size))
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        # A shard's gradient beyond ±limit would make the sum inexact. Multiplied by 2**128/limit it overflows
        # float32 to infinity, so one multiplication finds it, and infinity stays in the sum on every rank.
        limit_bits = self.SUM_BITS - math.ceil(math.log2(virtual_shards))
        self.limit = 2.0**limit_bits
        self.to_bound = 2.0 ** (128 - limit_bits)
        self.to_grid = 2.0**self.GRID_BITS / self.to_bound
        device = self.parameters[0].device
        self.heard = StopFlag(device)
        self.exchanged = torch.zeros(sum(self.sizes) + 1, dtype=torch.float64, device=device)
        self.sum, self.flag = self.exchanged[:-1], self.exchanged[-1]
        self.shard_sum, self.begun = torch.empty_like(self.sum), False
        self.watch = watch
        self.bad = torch.zeros((), dtype=torch.bool, device=device)

    def settle(self, empty: Tensor) -> None:
        """Nothing settles: the order of adding does not matter."""

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into its virtual shards; a short last batch may leave some empty."""
        per_rank = self.micro_batches_per_rank
        return [
            (self.env.rank + k * self.env.world_size, tuple(tensor[k::per_rank].contiguous() for tensor in tensors))
            for k in range(per_rank)
        ]

    def limit_micro_batch(self, images: int) -> None:
        """Nothing is to do: a shard has as many images on any number of ranks."""

    def begin(self, asked: bool) -> None:
        """Begin a step; ``asked`` says that this rank was asked to stop."""
        self.flag.fill_(asked)
        self.begun = False

    def begin_again(self, empty: Tensor) -> None:  # noqa: ARG002
        """Forget a step that broke off anywhere; what ``begin`` was told of it holds."""
        self.begun = False

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Surround forward and backward of one micro-batch, then move its gradient into the exact sum."""
        yield
        flat = torch.cat([_gradient_in_memory_order(parameter) for parameter in self.parameters])
        flat.mul_(self.to_bound).mul_(self.to_grid).round_()  # whole numbers of grid steps; float32 rounds them exactly
        if self.begun:
            self.sum.add_(self.shard_sum.copy_(flat))
        else:
            self.sum.copy_(flat)
        self.begun = True
        for parameter in self.parameters:
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """Compute the gradient of ``loss``; one that is not finite turns the flag into NaN, for all ranks."""
        self.flag.add_(loss.detach() * 0)
        loss.backward()

    def finish(self) -> None:
        """Sum over ranks, and hand out float32 gradients. A collective."""
        self.marks.ready()
        self.all_reduce(self.exchanged)
        self.marks.reduced()
        flat = self.sum.mul_(2.0**-self.GRID_BITS).float()
        for parameter, gradient in zip(self.parameters, flat.split(self.sizes), strict=True):
            parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())  # the optimizer wants them alike
        sums = self.flag + flat.sum() if self.watch else self.flag  # finite where all of them are: each is below 2**12
        torch.ne(sums * 0, 0, out=self.bad)  # infinity and NaN times 0 are NaN, which is not 0

    def hear(self) -> None:
        """Look, at the end of a step, whether any rank was asked to stop."""
        self.heard.put(self.flag)


def _gradient_in_memory_order(parameter: Tensor) -> Tensor:
    """View a parameter's gradient as (number of elements,), in the order in which the parameter lies in memory."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
