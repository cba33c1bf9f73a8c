"""Sums whose order does not matter, and random numbers that do not depend on who draws them.

Adding floats rounds, so a sum depends on its order: on the number of ranks, on ring or tree. A float64 that
is a multiple of 2**-b is exact up to 2**(53-b), and so is every sum of such numbers below that: no addition
rounds, and any order gives the same bits. NaN and infinity pass through such sums and stay visible.
"""

import torch
from torch import Tensor

LOSS_BITS = 20
"""Losses are summed in steps of 2**-20 nats: exact up to 2**33 nats, a billion images and more."""


def round_to_grid(values: Tensor, bits: int) -> Tensor:
    """Round float64 ``values``, in place, to multiples of 2**-bits; return them. Powers of two scale exactly."""
    return values.mul_(2.0**bits).round_().mul_(2.0**-bits)


def seed_micro_batch(device: torch.device, seed: int, step: int, shard: int) -> None:
    """Seed ``device``'s generator for one micro-batch, so that dropout in it depends on these three alone.

    Then no generator's state needs to be saved, and ranks can share the shards in any way.
    """
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    generator.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + shard + 1) % 2**63)
