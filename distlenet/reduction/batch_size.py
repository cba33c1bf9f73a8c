"""The division of a global batch into ranks and micro-batches."""

from distlenet.config.schema import Config
from distlenet.config.virtual_shards import virtual_shards
from distlenet.utils.errors import UserError


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the largest micro-batch of a rank, in samples.

    Raise UserError, with the nearest values that work, if the global batch does not divide evenly.
    """
    batch, shards = config.train.global_batch_size, virtual_shards(config)
    accumulation, uneven = config.train.accumulation_steps, config.distributed.allow_uneven_batches
    if config.distributed.reduction == "ddp":
        parts = world_size * accumulation
        if batch % parts and not uneven:
            ranks = f"{world_size} ranks × {accumulation} accumulation steps"
            raise _not_divisible(batch, parts, ranks, or_give=" or distributed.allow_uneven_batches=true")
        return -(-batch // parts)
    if world_size > shards or (shards % world_size and not uneven):
        raise _ranks_do_not_divide(config, shards, world_size)
    if accumulation != 1:
        raise UserError(
            f"train.accumulation_steps={accumulation}: with distributed.reduction=exact a rank "
            "takes one micro-batch per virtual shard; for smaller ones raise distributed.virtual_shards"
        )
    if batch % shards:
        raise _not_divisible(batch, shards, f"distributed.virtual_shards={shards}")
    return batch // shards


def _ranks_do_not_divide(config: Config, shards: int, world_size: int) -> UserError:
    batch, sizes = config.train.global_batch_size, [size for size in range(1, shards + 1) if shards % size == 0]
    ranks = f"{' or '.join(map(str, sizes))} rank{'s' * (shards > 1)}"
    auto = f" (auto, for train.global_batch_size={batch})" * (config.distributed.virtual_shards == "auto")
    other = f"distributed.virtual_shards={world_size}, which changes the result,"
    return UserError(
        f"distributed.virtual_shards={shards}{auto}: is not divisible by {world_size} ranks; start {ranks}, or give "
        f"{other if batch % world_size == 0 else 'another value'} or distributed.reduction=ddp"
    )


def _not_divisible(batch: int, divisor: int, description: str, or_give: str = "") -> UserError:
    below = batch // divisor * divisor
    sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
    return UserError(f"train.global_batch_size={batch}: is not divisible by {description}; give {sizes}{or_give}")
