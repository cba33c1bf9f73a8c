"""Check that all ranks hold the same parameters and buffers, to the bit, with one small all-reduce."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.distributed.collectives import gather
from distlenet.reduction.buffers import persistent_buffers

CHUNK = {"cpu": 1 << 16}
"""Elements that are hashed at once, with 32 bytes of temporary memory each: on a CPU, these should fit in a cache."""

INTEGER_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class ReplicaMismatch(RuntimeError):
    """Ranks hold different parameters or buffers: a hardware error or a bug, which must not go unnoticed."""


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers by name."""
    buffers = {buffer.name: buffer.tensor for buffer in persistent_buffers(model)}
    return {**dict(model.named_parameters()), **buffers}


def fingerprints(model: nn.Module) -> Tensor:
    """Hash the bits of each parameter and buffer: int64 (number of these,), on their device. No host sync.

    The hash is a sum modulo 2**64 with odd weights: a change of any one element changes it.
    """
    return torch.stack([_fingerprint(tensor.detach()) for tensor in named_state(model).values()])


def _fingerprint(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = tensor.contiguous().view(-1).view(INTEGER_TYPES[tensor.element_size()])
    chunks = bits.split(CHUNK.get(bits.device.type, 1 << 22))
    total, start = _weighted_sum(chunks[0], 0), len(chunks[0])
    for chunk in chunks[1:]:
        total += _weighted_sum(chunk, start)  # in place: results in a list would fragment the memory of the chunks
        start += len(chunk)
    return total


def _weighted_sum(bits: Tensor, start: int) -> Tensor:
    weights = torch.arange(2 * start + 1, 2 * (start + len(bits)) + 1, 2, device=bits.device)
    return (bits.long() * (weights * 0x5851F42D4C957F2D)).sum()


def check_replicas(model: nn.Module) -> None:
    """Raise ReplicaMismatch, on every rank, if parameters or buffers differ between ranks.

    A collective, then a host sync.
    """
    own = fingerprints(model)
    extremes = torch.stack([own, ~own])  # the maximum of ~x is ~ of the minimum of x
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if torch.equal(extremes[0], ~extremes[1]):  # host sync
        return
    table = gather(own)  # (ranks, tensors); a collective
    common = table.mode(dim=0).values
    names = list(named_state(model))
    mismatches = [
        f"rank {rank}: {', '.join(name for name, differs in zip(names, row != common, strict=True) if differs)}"
        for rank, row in enumerate(table)
        if not torch.equal(row, common)
    ]
    raise ReplicaMismatch(
        f"ranks hold different parameters (compared with the values of most ranks): {'; '.join(mismatches)}; check the "
        "machines of these ranks, then run the same command again to resume from the newest checkpoint"
    )
