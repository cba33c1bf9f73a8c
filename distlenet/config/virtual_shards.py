"""``distributed.virtual_shards=auto``: as many shards as add at most about 10 % to the time of a step."""

from distlenet.config.schema import Config

MAX_SHARDS = 8
MIN_SAMPLES = 256
"""Samples of a shard, at least: with 128, two ranks with 8 shards take 12 % longer (benchmarks/reduction_cost.py)."""
MIN_SAMPLES_OF_TWO = 32
"""The same for two shards: on two ranks, each computes one, which takes no longer."""


def virtual_shards(config: Config) -> int:
    """Return ``distributed.virtual_shards``, with auto resolved."""
    return resolve_virtual_shards(config.distributed.virtual_shards, config.train.global_batch_size)


def resolve_virtual_shards(setting: int | str, global_batch_size: int) -> int:
    """Return the number of shards of a setting. It does not depend on the number of ranks, as the result must not.

    auto is the largest power of two up to ``MAX_SHARDS`` that divides the global batch and leaves ``MIN_SAMPLES`` per
    shard, or else 2 with ``MIN_SAMPLES_OF_TWO``, or else 1.
    """
    if isinstance(setting, int):
        return setting
    shards = MAX_SHARDS
    while shards > 2 and (global_batch_size % shards or global_batch_size // shards < MIN_SAMPLES):
        shards //= 2
    return shards if global_batch_size % shards == 0 and global_batch_size // shards >= MIN_SAMPLES_OF_TWO else 1
