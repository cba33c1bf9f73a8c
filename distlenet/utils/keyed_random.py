"""Random-looking numbers that are functions of what they are for, not of who draws them, nor when."""

import torch
from torch import Tensor

BITS_32 = 0xFFFFFFFF


def mix32(state: Tensor) -> Tensor:
    """Scramble 32-bit numbers, held in int64, one to one.

    The "lowbias32" mixer (https://nullprogram.com/blog/2018/07/31/).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        state = ((state ^ (state >> shift)) * factor) & BITS_32
    return state ^ (state >> 16)


def hash32(values: Tensor, *words: int | Tensor) -> Tensor:
    """Hash (value, words...) to 32 random-looking bits, as int64 of the shape of ``values``."""
    state = mix32(values & BITS_32)
    for word in words:
        state = mix32((state ^ word) & BITS_32)
    return state


def seed_micro_batch(device: torch.device, seed: int, step: int, shard: int) -> None:
    """Seed ``device``'s generator for one micro-batch, so that dropout in it depends on these three alone.

    Then no generator's state needs to be saved, and ranks can share the shards in any way.
    """
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + shard + 1) % 2**63)
