"""How the gradients of a global batch come together: exactly, or as DistributedDataParallel does it.

Both take a rank's share of a global batch apart into micro-batches, and leave in each parameter's ``grad``
the gradient of the mean loss over all ranks. The loss of a micro-batch is to be the sum over its images
times ``weight`` / (images of the global batch).

One number more travels in the same all-reduce: whether any rank was asked to stop. ``heard`` tells.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NoReturn

import torch
import torch._dynamo  # see below
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from distlenet.errors import UserError
from distlenet.preemption import Heard
from distlenet.schema import Config
from distlenet.world import World

# DistributedDataParallel imports torch._dynamo when it is first built, and an exception kept from that import
# (seen with torch 2.15) keeps every frame under way alive, with the trainer and the process group in them.
# Imported up here, it finds no such frames: the group can end when its ``with`` block does.

MEND = "give a smaller optim.lr, a longer optim.warmup_steps or train.clip_norm, and look at the data"

MicroBatch = tuple[int, tuple[Tensor, ...]]
"""A micro-batch's number within the global batch, and its part of each tensor."""


class _WithFlag(nn.Module):
    """A network, beside it a parameter that is always 0 and that nothing uses: only its gradient is meant."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.flag = nn.Parameter(torch.zeros((), device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits


class DdpReduction:
    """DistributedDataParallel: floats, averaged over ranks in whatever order the backend adds them."""

    def __init__(
        self, net: nn.Module, world: World, accumulation_steps: int, micro_batch: int, compress: bool = False
    ) -> None:
        """Wrap ``net``; a rank's share is cut into ``accumulation_steps`` parts of up to ``micro_batch`` images.

        With ``compress`` gradients travel as bf16.
        """
        self.net = net
        device = next(net.parameters()).device
        with_flag = _WithFlag(net, device)
        self.flag = with_flag.flag
        self.heard = Heard(device)
        self.model = DistributedDataParallel(with_flag, gradient_as_bucket_view=True)
        if compress:
            self.model.register_comm_hook(None, bf16_compress_hook)
        self.weight = world.world_size  # DDP divides by it
        self.rank, self.micro_batch_size, self.micro_batches_per_rank = world.rank, micro_batch, accumulation_steps

    def settle(self, empty: Tensor) -> None:
        """Step once on no images, an ``empty`` batch (0, ...), and throw the gradients away. A collective.

        After its first backward DistributedDataParallel orders its buckets anew. With three ranks or more the place
        in a bucket decides in which order floats are added; so a run that goes on must have the order that one
        without a stop has by then.
        """
        self.net.eval()
        for _ in range(2):  # the new order comes with the second forward
            self.backward(self.model(empty).sum(), asked=False)
        self.net.train()
        self.model.zero_grad(set_to_none=True)

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into neighbours; an empty share is one empty micro-batch."""
        parts = zip(*(tensor.split(self.micro_batch_size) for tensor in tensors), strict=True)
        return list(enumerate(parts, start=self.rank * self.micro_batches_per_rank))

    def limit_micro_batch(self, images: int) -> None:
        """Take no micro-batch of more than ``images``, with more of them: fewer ranks need no more memory each."""
        share = self.micro_batch_size * self.micro_batches_per_rank
        if images < self.micro_batch_size:
            self.micro_batch_size, self.micro_batches_per_rank = images, -(-share // images)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch. With the last one, a collective."""
        with nullcontext() if last else self.model.no_sync():
            yield

    def backward(self, loss: Tensor, asked: bool) -> None:
        """Add the gradient of ``loss``; ``asked`` says that this rank was asked to stop."""
        (loss + self.flag * float(asked)).backward()

    def finish(self, step: int) -> None:  # noqa: ARG002
        """Hear what all ranks said: the last backward has reduced."""
        assert self.flag.grad is not None
        self.heard.put(self.flag.grad)
        self.flag.grad = None

    def check(self) -> None:
        """Raise UserError, on every rank, where a parameter is not finite: no later step mends that. A host sync."""
        named = list(self.net.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for _, parameter in named]).tolist()
        if not all(finite):
            names = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
            raise UserError(f"{', '.join(names)}: not finite any more; {MEND}")


class ExactReduction:
    """The same bits for every number of ranks.

    Position p of a global batch belongs to virtual shard p % V, whatever the world size W; a rank has the V/W
    shards congruent to its rank, one micro-batch each (one fewer on some ranks, where W does not divide V and
    ``distributed.uneven`` allows it). Each shard's gradient is computed alone, by the same
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
        if odd := [name for name, p in named if p.dtype != torch.float32 or torch.empty_like(p).stride() != p.stride()]:
            raise UserError(f"distributed.reduction=exact: needs float32 parameters without gaps, but {odd[0]} is not")
        self.model = net
        self.weight = 1
        self.world = world
        self.micro_batch_size = micro_batch
        self.micro_batches_per_rank = len(range(world.rank, virtual_shards, world.world_size))
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        self.sizes = [p.numel() for p in self.parameters]
        # A shard's gradient beyond ±limit would make the sum inexact. Multiplied by 2**128/limit it overflows
        # float32 to infinity, so one multiplication finds it, and infinity stays in the sum on every rank.
        limit_bits = self.SUM_BITS - math.ceil(math.log2(virtual_shards))
        self.limit = 2.0**limit_bits
        self.to_bound = 2.0 ** (128 - limit_bits)
        self.to_grid = 2.0**self.GRID_BITS / self.to_bound
        device = self.parameters[0].device
        self.heard = Heard(device)
        self.exchanged = torch.zeros(sum(self.sizes) + 1, dtype=torch.float64, device=device)
        self.sum, self.flag = self.exchanged[:-1], self.exchanged[-1]
        self.shard_sum, self.begun = torch.empty_like(self.sum), False
        self.watch = watch
        self.bad = torch.zeros(len(self.sum), dtype=torch.bool, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def settle(self, empty: Tensor) -> None:
        """Nothing settles: the order of adding does not matter."""

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into its virtual shards; a short last batch may leave some empty."""
        per_rank = self.micro_batches_per_rank
        return [
            (self.world.rank + k * self.world.world_size, tuple(tensor[k::per_rank].contiguous() for tensor in tensors))
            for k in range(per_rank)
        ]

    def limit_micro_batch(self, images: int) -> None:
        """Nothing is to do: a shard has as many images on any number of ranks."""

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

    def backward(self, loss: Tensor, asked: bool) -> None:
        """Compute the gradient of ``loss``; ``asked`` says that this rank was asked to stop."""
        if asked:
            self.flag.fill_(1.0)
        loss.backward()

    def finish(self, step: int) -> None:
        """Sum over ranks, and hand out float32 gradients. A collective."""
        dist.all_reduce(self.exchanged)
        self.heard.put(self.flag)
        flat = self.sum.mul_(2.0**-self.GRID_BITS).float()
        self.flag.zero_()
        self.begun = False
        for parameter, gradient in zip(self.parameters, flat.split(self.sizes), strict=True):
            parameter.grad = gradient.as_strided(parameter.shape, parameter.stride())  # the optimizer wants them alike
        # A sum over all finds what is not finite; which it was waits on the device for ``check``, without a host sync.
        if self.watch and (flat.is_cuda or not flat.sum().isfinite()):
            found = ~flat.isfinite()
            first = (self.bad_step < 0) & found.any()
            self.bad |= found & first
            self.bad_step = torch.where(first, step, self.bad_step)

    def check(self) -> None:
        """Raise UserError, on every rank, where a gradient since the start was not finite. A host sync."""
        if (step := int(self.bad_step)) >= 0:
            names = [name for name, bad in zip(self.names, self.bad.split(self.sizes), strict=True) if bad.any()]
            raise UserError(
                f"step {step + 1}: the gradient of {', '.join(names)} is not finite or beyond ±{self.limit:g}; {MEND}"
            )


def _gradient_in_memory_order(parameter: Tensor) -> Tensor:
    """View a parameter's gradient as (number of elements,), in the order in which the parameter lies in memory."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))


Reduction = DdpReduction | ExactReduction


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the largest micro-batch of a rank.

    Raises UserError, with the nearest values that work, where the global batch does not divide evenly.
    """
    batch, shards = config.train.global_batch_size, config.distributed.virtual_shards
    accumulation, uneven = config.train.accumulation_steps, config.distributed.uneven
    if config.distributed.reduction == "ddp":
        parts = world_size * accumulation
        if batch % parts and not uneven:
            _refuse(batch, parts, f"{world_size} ranks × {accumulation} accumulation steps")
        return -(-batch // parts)
    if world_size > shards or (shards % world_size and not uneven):
        sizes = ", ".join(str(size) for size in range(1, shards + 1) if shards % size == 0)
        raise UserError(
            f"distributed.virtual_shards={shards} does not divide by {world_size} ranks; numbers of ranks that "
            f"work: {sizes}; or give another distributed.virtual_shards, or distributed.reduction=ddp"
        )
    if accumulation != 1:
        raise UserError(
            f"train.accumulation_steps={accumulation}: with distributed.reduction=exact a rank "
            "takes one micro-batch per virtual shard; for smaller ones raise distributed.virtual_shards"
        )
    if batch % shards:
        _refuse(batch, shards, f"distributed.virtual_shards={shards}")
    return batch // shards


def _refuse(batch: int, divisor: int, divisor_in_words: str) -> NoReturn:
    below = batch // divisor * divisor
    sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
    raise UserError(
        f"train.global_batch_size={batch} does not divide by {divisor_in_words}; the nearest that do: {sizes}"
    )


def make_reduction(config: Config, net: nn.Module, world: World, watch: bool) -> Reduction:
    """Make the reduction that ``distributed.reduction`` names. Raises UserError where it cannot be."""
    size = micro_batch_size(config, world.world_size)
    if config.distributed.reduction == "ddp":
        compress = config.distributed.compress == "bf16"
        return DdpReduction(net, world, config.train.accumulation_steps, size, compress)
    if config.distributed.compress != "none":
        raise UserError("distributed.compress=bf16 rounds what distributed.reduction=exact does not; give ddp, or none")
    return ExactReduction(net, world, config.distributed.virtual_shards, size, watch)
