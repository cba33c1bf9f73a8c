"""The division of a global batch into ranks and micro-batches."""

from distlenet.config.schema import Config
from distlenet.utils.errors import UserError


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the largest micro-batch of a rank, in samples.

    Raise UserError, with the nearest values that work, if the global batch does not divide evenly.
    """
    batch, shards = config.train.global_batch_size, config.distributed.virtual_shards
    accumulation, uneven = config.train.accumulation_steps, config.distributed.allow_uneven_batches
    if config.distributed.reduction == "ddp":
        parts = world_size * accumulation
        if batch % parts and not uneven:
            raise _does_not_divide(batch, parts, f"{world_size} ranks × {accumulation} accumulation steps")
        return -(-batch // parts)
    if world_size > shards or (shards % world_size and not uneven):
        sizes = " or ".join(str(size) for size in range(1, shards + 1) if shards % size == 0)
        raise UserError(
            f"distributed.virtual_shards={shards}: does not divide by {world_size} ranks; start {sizes} ranks, or give "
            "another distributed.virtual_shards, or distributed.reduction=ddp"
        )
    if accumulation != 1:
        raise UserError(
            f"train.accumulation_steps={accumulation}: with distributed.reduction=exact a rank "
            "takes one micro-batch per virtual shard; for smaller ones raise distributed.virtual_shards"
        )
    if batch % shards:
        raise _does_not_divide(batch, shards, f"distributed.virtual_shards={shards}")
    return batch // shards


def _does_not_divide(batch: int, divisor: int, description: str) -> UserError:
    below = batch // divisor * divisor
    sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
    return UserError(f"train.global_batch_size={batch}: does not divide by {description}; give {sizes}")
