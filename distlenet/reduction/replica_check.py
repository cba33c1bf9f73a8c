"""Do all ranks hold the same network, to the bit? One small all-reduce tells."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their size in bytes


class ReplicasDiffer(RuntimeError):
    """Ranks hold different parameters: a broken device, memory error or bug; going on would hide it."""


def fingerprints(net: nn.Module) -> Tensor:
    """Hash each parameter's bits: int64 (number of parameters,), on the parameters' device. No host sync.

    A weighted sum modulo 2**64, with odd weights: any one changed element changes it.
    """
    sums = []
    for parameter in net.parameters():
        bits = parameter.detach().contiguous().view(-1).view(BITS[parameter.element_size()]).long()
        weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)
        sums.append((bits * (weights * 0x5851F42D4C957F2D)).sum())
    return torch.stack(sums)


def check_replicas(net: nn.Module) -> None:
    """Raise ReplicasDiffer, on every rank, naming the ranks and parameters that differ. A collective, a host sync."""
    mine = fingerprints(net)
    extremes = torch.stack([mine, ~mine])  # the largest of ~x is ~ of the smallest x
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if torch.equal(extremes[0], ~extremes[1]):
        return
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    table = torch.stack(of_ranks)  # (ranks, parameters)
    common = table.mode(dim=0).values
    names = [name for name, _ in net.named_parameters()]
    differing = [
        f"rank {rank}: {', '.join(name for name, odd in zip(names, row != common, strict=True) if odd)}"
        for rank, row in enumerate(table)
        if not torch.equal(row, common)
    ]
    raise ReplicasDiffer(
        "ranks hold different parameters (what most ranks hold taken as right): " + "; ".join(differing) + "; "
        "look at those ranks' machines, then run again: it goes on from the newest checkpoint"
    )
