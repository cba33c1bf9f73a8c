"""How the gradients of a global batch come together: exactly, or as DistributedDataParallel does it.

Both take a rank's share of a global batch apart into micro-batches, and leave in each parameter's ``grad``
the gradient of the mean loss over all ranks. The loss of a micro-batch is to be the sum over its images
times ``weight`` / (images of the global batch).

One number more travels in the same all-reduce: whether any rank was asked to stop, which ``heard`` tells, and NaN
where the loss of any rank is not finite. After ``finish``, ``bad`` says that, and for the exact reduction also that a
gradient is not finite or too large to be added exactly.
"""

from torch import nn

from distlenet.errors import UserError
from distlenet.reduction.ddp import DdpReduction
from distlenet.reduction.exact import ExactReduction
from distlenet.reduction.node import pick_all_reduce
from distlenet.reduction.share import micro_batch_size
from distlenet.schema import Config
from distlenet.world import World

__all__ = ["DdpReduction", "ExactReduction", "Reduction", "make_reduction", "micro_batch_size"]

Reduction = DdpReduction | ExactReduction


def make_reduction(config: Config, net: nn.Module, world: World, watch: bool) -> Reduction:
    """Make the reduction that ``distributed.reduction`` names. A collective. Raises UserError where it cannot be."""
    size = micro_batch_size(config, world.world_size)
    device = next(net.parameters()).device
    all_reduce = pick_all_reduce(config.distributed.shared_memory, world, device)
    if config.distributed.reduction == "ddp":
        compress = config.distributed.compress == "bf16"
        return DdpReduction(net, world, config.train.accumulation_steps, size, all_reduce, compress)
    if config.distributed.compress != "none":
        raise UserError(
            "distributed.compress=bf16: rounds what distributed.reduction=exact does not; give "
            "distributed.reduction=ddp, or distributed.compress=none"
        )
    return ExactReduction(net, world, config.distributed.virtual_shards, size, watch, all_reduce)
