"""Make the reducer that the settings name."""

from torch import nn

from distlenet.config.schema import Config
from distlenet.config.virtual_shards import virtual_shards
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.batch_size import micro_batch_size
from distlenet.reduction.ddp import DdpReducer
from distlenet.reduction.exact import ExactReducer
from distlenet.reduction.flat import FlatReducer, fits_flat_buffer
from distlenet.reduction.lockstep import LockstepReducer
from distlenet.reduction.reducer import Reducer
from distlenet.reduction.shared_memory import resolve_all_reduce
from distlenet.utils.errors import UserError


def make_reducer(
    config: Config, model: nn.Module, env: DistributedEnvironment, check_finite: bool, weighted: bool
) -> Reducer:
    """Make the reducer of ``distributed.reduction``. A collective.

    ``check_finite=False`` is for loss scaling, which expects overflows; ``weighted`` is for weighted losses. Raise
    UserError if settings or model do not allow it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise UserError(
                f"{name} (SyncBatchNorm): waits for all ranks in each forward pass, forever if one of them has fewer "
                "micro-batches; give model.sync_batchnorm=true, or use BatchNorm"
            )
    size, settings = micro_batch_size(config, env.world_size), config.distributed
    if settings.reduction == "exact" and settings.gradient_compression != "none":
        raise UserError(
            "distributed.gradient_compression=bf16: rounds what distributed.reduction=exact does not; give "
            "distributed.reduction=ddp, or distributed.gradient_compression=none"
        )
    all_reduce = resolve_all_reduce(settings.shared_memory, env, next(model.parameters()).device)
    if settings.reduction == "ddp":
        compress = settings.gradient_compression == "bf16"
        steps, find_unused = config.train.accumulation_steps, settings.find_unused_parameters
        if not compress and fits_flat_buffer(model, all_reduce):
            return FlatReducer(model, env, steps, size, all_reduce, weighted, find_unused)
        return DdpReducer(model, env, steps, size, all_reduce, compress, weighted, find_unused)
    kind = LockstepReducer if config.model.sync_batchnorm else ExactReducer
    return kind(model, env, virtual_shards(config), size, check_finite, all_reduce, weighted)
