"""How a global batch is cut into micro-batches, and what all reductions say alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from distlenet.config.schema import Config
from distlenet.utils.errors import UserError

MicroBatch = tuple[int, tuple[Tensor, ...]]
"""A micro-batch's number within the global batch, and its part of each tensor."""


def _nobody() -> None:
    """Nobody wants to know."""


@dataclass
class Marks:
    """Who is told when, in each step: for a clock."""

    ready: Callable[[], None] = _nobody  # this rank's gradient is there
    reduced: Callable[[], None] = _nobody  # those of all ranks are added


def micro_batch_size(config: Config, world_size: int) -> int:
    """Return the largest micro-batch of a rank.

    Raises UserError, with the nearest values that work, where the global batch does not divide evenly.
    """
    batch, shards = config.train.global_batch_size, config.distributed.virtual_shards
    accumulation, uneven = config.train.accumulation_steps, config.distributed.allow_uneven_batches
    if config.distributed.reduction == "ddp":
        parts = world_size * accumulation
        if batch % parts and not uneven:
            _refuse(batch, parts, f"{world_size} ranks × {accumulation} accumulation steps")
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
        _refuse(batch, shards, f"distributed.virtual_shards={shards}")
    return batch // shards


def _refuse(batch: int, divisor: int, divisor_in_words: str) -> NoReturn:
    below = batch // divisor * divisor
    sizes = " or ".join(str(size) for size in (below, below + divisor) if size)
    raise UserError(f"train.global_batch_size={batch}: does not divide by {divisor_in_words}; give {sizes}")
