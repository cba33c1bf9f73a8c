"""How the gradients of a global batch come together: exactly, or as DistributedDataParallel does it.

Both take a rank's share of a global batch apart into micro-batches, and leave in each parameter's ``grad``
the gradient of the mean loss over all ranks. The loss of a micro-batch is to be the sum over its images
times ``weight`` / (images of the global batch).

One number more travels in the same all-reduce: whether any rank was asked to stop, which ``heard`` tells, and NaN
where the loss of any rank is not finite. After ``finish``, ``bad`` says that, and for the exact reduction also that a
gradient is not finite or too large to be added exactly.
"""

from torch import nn

from distlenet.config.schema import Config
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.ddp import DdpReducer
from distlenet.reduction.exact import ExactReducer
from distlenet.reduction.micro_batching import micro_batch_size
from distlenet.reduction.shared_memory import resolve_all_reduce
from distlenet.utils.errors import UserError

__all__ = ["DdpReducer", "ExactReducer", "Reduction", "make_reducer", "micro_batch_size"]

Reduction = DdpReducer | ExactReducer


def make_reducer(config: Config, net: nn.Module, env: DistributedEnvironment, watch: bool) -> Reduction:
    """Make the reduction that ``distributed.reduction`` names. A collective. Raises UserError where it cannot be."""
    size = micro_batch_size(config, env.world_size)
    device = next(net.parameters()).device
    all_reduce = resolve_all_reduce(config.distributed.shared_memory, env, device)
    if config.distributed.reduction == "ddp":
        compress = config.distributed.gradient_compression == "bf16"
        return DdpReducer(net, env, config.train.accumulation_steps, size, all_reduce, compress)
    if config.distributed.gradient_compression != "none":
        raise UserError(
            "distributed.gradient_compression=bf16: rounds what distributed.reduction=exact does not; give "
            "distributed.reduction=ddp, or distributed.gradient_compression=none"
        )
    return ExactReducer(net, env, config.distributed.virtual_shards, size, watch, all_reduce)
