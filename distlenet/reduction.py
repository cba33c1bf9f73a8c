"""How the gradients of a global batch come together: exactly, or as DistributedDataParallel does it.

Both take a rank's share of a global batch apart into micro-batches, and leave in each parameter's ``grad``
the gradient of the mean loss over all ranks. The loss of a micro-batch is to be the sum over its images
times ``weight`` / (images of the global batch).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch._dynamo  # see below
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distlenet.distributed import World
from distlenet.errors import UserError
from distlenet.exact import round_to_grid
from distlenet.schema import Config

# DistributedDataParallel imports torch._dynamo when it is first built, and an exception kept from that import
# (seen with torch 2.15) keeps every frame under way alive, with the trainer and the process group in them.
# Imported up here, it finds no such frames: the group can end when its ``with`` block does.

MicroBatch = tuple[int, tuple[Tensor, ...]]
"""A micro-batch's number within the global batch, and its part of each tensor."""


class DdpReduction:
    """DistributedDataParallel: floats, averaged over ranks in whatever order the backend adds them."""

    def __init__(self, net: nn.Module, world: World, accumulation_steps: int, micro_batch: int) -> None:
        """Wrap ``net``; a rank's share is cut into ``accumulation_steps`` parts of up to ``micro_batch`` images."""
        self.model: nn.Module = DistributedDataParallel(net, gradient_as_bucket_view=True)
        self.weight = world.world_size  # DDP divides by it
        self.first = world.rank * accumulation_steps
        self.micro_batch_size = micro_batch
        self.micro_batches_per_rank = accumulation_steps

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into neighbours; an empty share is one empty micro-batch."""
        parts = zip(*(tensor.split(self.micro_batch_size) for tensor in tensors), strict=True)
        return list(enumerate(parts, start=self.first))

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch. With the last one, a collective."""
        with nullcontext() if last else self.model.no_sync():  # type: ignore[operator]
            yield

    def finish(self, step: int) -> None:
        """Nothing is left to do: the last backward has reduced."""

    def check(self) -> None:
        """Nothing is watched."""


class ExactReduction:
    """The same bits for every number of ranks.

    Position p of a global batch belongs to virtual shard p % V, whatever the world size W; a rank has the V/W
    shards congruent to its rank, one micro-batch each. Each shard's gradient is computed alone, by the same
    kernels on the same shapes everywhere, then rounded to multiples of 2**-40 (9e-13) and summed without
    rounding (see ``distlenet.exact``): on the rank, then over ranks in one float64 all-reduce.
    """

    GRID_BITS = 40
    SUM_BITS = 12  # the sum over all shards stays below 2**12, half of what float64 holds exactly at this grid

    def __init__(self, net: nn.Module, world: World, virtual_shards: int, micro_batch: int, watch: bool) -> None:
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
        if odd := [name for name, p in named if p.dtype != torch.float32]:
            raise UserError(f"distributed.reduction=exact: needs float32 parameters, but {odd[0]} is not")
        self.model = net
        self.weight = 1
        self.world = world
        self.micro_batch_size = micro_batch
        self.micro_batches_per_rank = virtual_shards // world.world_size
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        # A shard's gradient beyond ±limit would make the sum inexact. Multiplied by 2**128/limit it overflows
        # float32 to infinity, so one multiplication finds it, and infinity stays in the sum on every rank.
        limit_bits = self.SUM_BITS - math.ceil(math.log2(virtual_shards))
        self.limit = 2.0**limit_bits
        self.scale = 2.0 ** (128 - limit_bits)
        device = self.parameters[0].device
        self.sum = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        self.shard_sum = torch.empty_like(self.sum)
        self.watch = watch
        self.bad = torch.zeros(len(self.sum), dtype=torch.bool, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into its virtual shards; a short last batch may leave some empty."""
        per_rank = self.micro_batches_per_rank
        return [
            (self.world.rank + k * self.world.world_size, tuple(tensor[k::per_rank].contiguous() for tensor in tensors))
            for k in range(per_rank)
        ]

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:  # noqa: ARG002
        """Surround forward and backward of one micro-batch, then move its gradient into the exact sum."""
        yield
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.shard_sum.copy_(flat.mul_(self.scale))
        self.sum.add_(round_to_grid(self.shard_sum, self.GRID_BITS, self.scale))
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self, step: int) -> None:
        """Sum over ranks, and hand out float32 gradients. A collective."""
        dist.all_reduce(self.sum)
        flat = self.sum.mul_(1 / self.scale).float()
        self.sum.zero_()
        for parameter, gradient in zip(self.parameters, flat.split(self.sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        if self.watch:  # no host sync: what is found waits on the device for ``check``
            found = ~flat.isfinite()
            first = (self.bad_step < 0) & found.any()
            self.bad |= found & first
            self.bad_step = torch.where(first, step, self.bad_step)

    def check(self) -> None:
        """Raise UserError, on every rank, where a gradient since the start was not finite. A host sync."""
        if (step := int(self.bad_step)) >= 0:
            names = [name for name, bad in zip(self.names, self.bad.split(self.sizes), strict=True) if bad.any()]
            raise UserError(
                f"step {step + 1}: the gradient of {', '.join(names)} is not finite or beyond ±{self.limit:g}; "
                "give a smaller optim.lr, a longer optim.warmup_steps or train.clip_norm, and look at the data"
            )


Reduction = DdpReduction | ExactReduction


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the largest micro-batch of a rank.

    Raises UserError, with the nearest values that work, where the global batch does not divide evenly.
    """
    batch, shards = config.train.global_batch_size, config.distributed.virtual_shards
    if config.distributed.reduction == "ddp":
        divisor, parts = (
            world_size * config.train.accumulation_steps,
            f"{world_size} ranks × {config.train.accumulation_steps} accumulation steps",
        )
    else:
        divisor, parts = shards, f"distributed.virtual_shards={shards}"
        if shards % world_size:
            sizes = ", ".join(str(size) for size in range(1, shards + 1) if shards % size == 0)
            raise UserError(
                f"distributed.virtual_shards={shards} does not divide by {world_size} ranks; numbers of ranks that "
                f"work: {sizes}; or give another distributed.virtual_shards, or distributed.reduction=ddp"
            )
        if config.train.accumulation_steps != 1:
            raise UserError(
                f"train.accumulation_steps={config.train.accumulation_steps}: with distributed.reduction=exact a rank "
                "takes one micro-batch per virtual shard; for smaller ones raise distributed.virtual_shards"
            )
    if batch % divisor:
        below = batch // divisor * divisor
        sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
        raise UserError(f"train.global_batch_size={batch} does not divide by {parts}; the nearest that do: {sizes}")
    return batch // divisor


def make_reduction(config: Config, net: nn.Module, world: World, watch: bool) -> Reduction:
    """Make the reduction that ``distributed.reduction`` names. Raises UserError where it cannot be."""
    size = micro_batch_size(config, world.world_size)
    if config.distributed.reduction == "ddp":
        return DdpReduction(net, world, config.train.accumulation_steps, size)
    return ExactReduction(net, world, config.distributed.virtual_shards, size, watch)
