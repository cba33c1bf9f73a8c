"""Sums over ranks that share one machine: added in memory that all of them map.

Gloo sends them through sockets instead, and wakes a thread of its own for each message. Where all processors are
busy, that takes milliseconds; to add a small network's gradients takes a hundredth of one (benchmarks/RESULTS.md).
"""

from collections.abc import Callable
from contextlib import ExitStack, closing

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.collectives import any_rank, broadcast_object
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.barrier import LINE, Barrier, Peer
from distlenet.utils.errors import warn
from distlenet.utils.mapped_file import SharedFile, in_memory

AllReduce = Callable[[Tensor], object]
"""Adds a tensor over all ranks, in place. A collective."""

PIECE = 2**20
"""Bytes of a rank's tensor that are added at a time: the memory needed does not grow with the network."""


class NodeAllReduce:
    """Adds tensors over the ranks of a node: each adds one part for all. Ranks are added in their order, always."""

    def __init__(self, memory: Tensor, rank: int, peers: list[Peer]) -> None:
        """Use ``memory``, uint8 (``size``,), which all ``peers`` map."""
        self.rank, self.ranks = rank, len(peers)
        self.barrier = Barrier(memory, rank, peers)
        self.places = memory[Barrier.size(self.ranks) :].view(self.ranks + 1, PIECE)  # one a rank, and the sum's

    @staticmethod
    def size(ranks: int) -> int:
        """Return the bytes of memory that ``ranks`` need."""
        return Barrier.size(ranks) + (ranks + 1) * PIECE

    def __call__(self, values: Tensor) -> None:
        """Add ``values``, contiguous and on the CPU, over all ranks, in place. A collective."""
        for piece in values.detach().view(-1).split(PIECE // values.element_size()):
            places = self.places.view(values.dtype)[:, : len(piece)]
            part = self._part(len(piece), values.element_size())
            total = places[-1, part]
            places[self.rank].copy_(piece)
            self.barrier.wait()
            torch.add(places[0, part], places[1, part], out=total)
            for other in range(2, self.ranks):
                total += places[other, part]
            self.barrier.wait()
            # None writes a sum again before all have come to the next barrier: then they have read this one.
            piece.copy_(places[-1])

    def _part(self, count: int, element_size: int) -> slice:
        """Say which of ``count`` numbers this rank adds: whole cache lines."""
        line = LINE // element_size
        each = -(-count // (self.ranks * line)) * line
        return slice(self.rank * each, (self.rank + 1) * each)


def resolve_all_reduce(wanted: str, env: DistributedEnvironment, device: torch.device) -> AllReduce:
    """Choose how gradients are added: in shared memory, where all ranks compute on one machine's CPUs. A collective.

    ``wanted`` is auto or off. Where memory cannot be shared, all ranks take the process group's, and rank 0 says so.
    """
    if wanted == "off" or device.type != "cpu":
        return dist.all_reduce
    if env.world_size == 1:
        return lambda values: values
    if any_rank(env.local_world_size != env.world_size, device):  # where ranks were told different things, too
        return dist.all_reduce
    with ExitStack() as stack:
        place, made, reasons = None, None, [""] * env.world_size
        try:
            if env.rank == 0:
                place = stack.enter_context(closing(_make_memory(env.world_size))).place
        except OSError as error:
            reasons[0] = str(error)
        place, reason = broadcast_object((place, reasons[0]))
        peers = [Peer.me()] * env.world_size
        dist.all_gather_object(peers, peers[0])
        try:
            made = NodeAllReduce(place.map(shared=True), env.rank, peers) if place else None
        except OSError as error:
            reason = str(error)
        dist.all_gather_object(reasons, reason)  # then all have mapped it, or none will: the file can be closed
    if made is None or any(reasons):
        if env.rank == 0:
            rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
            warn(
                f"distributed.shared_memory=auto: rank {rank} cannot share memory ({reason}), so Gloo adds the "
                "gradients, slower; run all ranks as one user in one process namespace, or give "
                "distributed.shared_memory=off"
            )
        return dist.all_reduce
    return made


def _make_memory(ranks: int) -> SharedFile:
    """Make memory for ``ranks``. Raises OSError where that cannot be."""
    file = in_memory([bytes(NodeAllReduce.size(ranks))])
    Barrier.lay_out(file.place.map(shared=True), ranks)
    return file
