"""``model.sync_batchnorm``: batch statistics over the global batch, on CPUs and GPUs.

Sums are exchanged in each forward and backward pass of such a layer: with ``ddp`` by all ranks, so that each rank needs
exactly one micro-batch per step, with at least one sample; with ``exact`` by all virtual shards (``lockstep``).
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import batchnorm

from distlenet.config.schema import Config
from distlenet.reduction.lockstep import this_shard
from distlenet.utils.errors import UserError

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _GlobalSum(torch.autograd.Function):
    """The sum over ranks or shards. Each of them uses it, so its gradient is a sum over them, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return _exchange(values, layer, backward=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.layer, backward=True), None


def _global_sum(values: Tensor, layer: nn.Module) -> Tensor:
    total = cast(Tensor, _GlobalSum.apply(values, layer))
    if (shard := this_shard()) is not None:
        shard.totals.append(total)
    return total


def _exchange(values: Tensor, layer: nn.Module, backward: bool) -> Tensor:
    """Return the sum of ``values``, float64 (n,), over all shards, or without shards over ranks. A collective."""
    if (shard := this_shard()) is not None:
        return shard.add(layer, backward, values)
    total = values.clone()
    dist.all_reduce(total)  # collective
    return total


class GlobalBatchNorm(batchnorm._BatchNorm):
    """BatchNorm with statistics of the global batch in training mode. Parameters and buffers are the same."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, but got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise. In training mode a collective, and in its backward pass another one."""
        self._check_input_dim(input)
        if not self.training:  # in an evaluation, ranks may have different numbers of batches
            return super().forward(input)
        values, dims = input.float(), [0, *range(2, input.dim())]
        local_count = float(values.numel() // values.shape[1])
        variance, mean = torch.var_mean(values, dims, correction=0)
        variance, mean = variance.double(), mean.double()
        count = torch.full_like(mean[:1], local_count)
        sums = torch.cat([mean * local_count, (variance + mean**2) * local_count, count])
        sums = _global_sum(sums, self)  # float64: the difference of squares below loses no digits
        total, squares, count = sums.tensor_split([len(mean), 2 * len(mean)])
        if local_count == 1 and float(count.detach()) == 1:  # host sync, only with a single local value; as torch does
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        self._update_running(mean.detach(), variance.detach(), count.detach())
        shape = [1, -1, *[1] * (input.dim() - 2)]
        scale, shift = (variance + self.eps).rsqrt(), mean
        normalised = (values - shift.float().view(shape)) * scale.float().view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = normalised.to(input.dtype)
        return result

    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
        self.running_mean.copy_(self.running_mean * (1 - factor) + mean * factor)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_var.copy_(self.running_var * (1 - factor) + unbiased * factor)


def use_global_statistics(model: nn.Module) -> None:
    """Turn each BatchNorm of ``model`` into a ``GlobalBatchNorm``, in place.

    Raise UserError if there is none, or if one has a forward pass that the user has written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, batchnorm._BatchNorm)}
    if not layers:
        raise UserError("model.sync_batchnorm=true: the model has no BatchNorm; leave the setting out")
    for name, layer in layers.items():
        if type(layer) not in CONVERTED:
            raise UserError(
                f"model.sync_batchnorm=true: {name} ({type(layer).__name__}) is not a BatchNorm of torch.nn; use one"
            )
        layer.__class__ = GlobalBatchNorm


def check_global_statistics(config: Config, world_size: int, smallest_batch: int) -> None:
    """Raise UserError if not all of a global batch is computed at once; ``smallest_batch`` is the last one."""
    if not config.model.sync_batchnorm:
        return
    if config.model.compile:
        raise UserError("model.sync_batchnorm=true: was not tested with model.compile=true; give one of them only")
    if config.distributed.reduction == "exact":
        return
    if config.train.accumulation_steps != 1:
        raise UserError(
            f"model.sync_batchnorm=true: train.accumulation_steps={config.train.accumulation_steps} splits the global "
            "batch into micro-batches that are computed one after the other; give train.accumulation_steps=1, or "
            "distributed.reduction=exact"
        )
    if smallest_batch < world_size:
        raise UserError(
            f"model.sync_batchnorm=true: the last global batch has {smallest_batch} samples, fewer than {world_size} "
            "ranks; give data.drop_last=true, another train.global_batch_size, or distributed.reduction=exact"
        )
