"""Random numbers that are functions of a key, such as (seed, epoch, index), and of no generator's state."""

import torch
from torch import Tensor

BITS_32 = 0xFFFFFFFF


def mix32(state: Tensor) -> Tensor:
    """Apply a bijective mixer to 32-bit numbers, stored in int64.

    It is the "lowbias32" mixer of https://nullprogram.com/blog/2018/07/31/.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = ((state ^ (state >> shift)) * factor) & BITS_32
    return state ^ (state >> 16)


def hash32(values: Tensor, *words: int | Tensor) -> Tensor:
    """Hash (value, words...) to 32 random bits, as int64 in the shape of ``values``."""
    state = mix32(values & BITS_32)
    for word in words:
        state = mix32((state ^ word) & BITS_32)
    return state


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that dropout on ``device`` uses."""
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]


def seed_micro_batch(generator: torch.Generator, seed: int, step: int, shard: int) -> None:
    """Seed ``generator`` for one micro-batch, such as for its dropout.

    The random numbers then depend only on (seed, step, shard): no generator state has to be saved, and any rank can
    process any shard.
    """
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + shard + 1) % 2**63)
