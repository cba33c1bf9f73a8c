"""An all-reduce for ranks on the CPUs of one machine, in memory that all of them map.

Gloo instead sends the values through sockets and wakes a thread for each message. On busy CPUs that takes milliseconds,
while adding the gradients of a small network takes a hundredth of one (benchmarks/RESULTS.md).
"""

from collections.abc import Callable
from contextlib import ExitStack, closing

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.collectives import all_gather_object, any_rank, broadcast_object
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.reduction.barrier import CACHE_LINE, Barrier, Peer
from distlenet.utils.errors import warn
from distlenet.utils.mapped_file import SharedFile, create_shared

AllReduce = Callable[[Tensor], object]
"""Sums a tensor over all ranks, in place. A collective."""

CHUNK_BYTES = 2**20
"""Bytes of a tensor that are summed at once: the memory needed does not grow with the network."""


class SharedMemoryAllReduce:
    """Sums tensors over the ranks of a machine, always in rank order; each rank sums one part for all."""

    def __init__(self, memory: Tensor, rank: int, peers: list[Peer]) -> None:
        """Use ``memory``, uint8 (``required_bytes``,), which all ``peers`` map."""
        self.rank, self.ranks = rank, len(peers)
        self.barrier = Barrier(memory, rank, peers)
        # One buffer per rank, and the last for the sum.
        self.buffers = memory[Barrier.required_bytes(self.ranks) :].view(self.ranks + 1, CHUNK_BYTES)

    @staticmethod
    def required_bytes(ranks: int) -> int:
        """Return the size of the memory for ``ranks`` ranks."""
        return Barrier.required_bytes(ranks) + (ranks + 1) * CHUNK_BYTES

    def __call__(self, values: Tensor) -> None:
        """Sum ``values``, contiguous and on the CPU, over all ranks, in place. A collective."""
        for chunk in values.detach().view(-1).split(CHUNK_BYTES // values.element_size()):
            buffers = self.buffers.view(values.dtype)[:, : len(chunk)]
            part = self._part(len(chunk), values.element_size())
            total = buffers[-1, part]
            buffers[self.rank].copy_(chunk)
            self.barrier.wait()
            torch.add(buffers[0, part], buffers[1, part], out=total)
            for other in range(2, self.ranks):
                total += buffers[other, part]
            self.barrier.wait()
            # No rank writes to the sum again before all have reached the next barrier, and so have read this sum.
            chunk.copy_(buffers[-1])

    def _part(self, count: int, element_size: int) -> slice:
        """Return which of ``count`` elements this rank sums, in units of cache lines."""
        line = CACHE_LINE // element_size
        length = -(-count // (self.ranks * line)) * line
        return slice(self.rank * length, (self.rank + 1) * length)


def resolve_all_reduce(wanted: str, env: DistributedEnvironment, device: torch.device) -> AllReduce:
    """Return the all-reduce for gradients: in shared memory if all ranks compute on one machine's CPUs. A collective.

    ``wanted`` is auto or off. If memory cannot be shared, all ranks use the process group, and rank 0 warns.
    """
    if wanted == "off" or device.type != "cpu":
        return dist.all_reduce
    if env.world_size == 1:
        return lambda values: values
    if any_rank(env.local_world_size != env.world_size, device):  # ranks may disagree
        return dist.all_reduce
    ref, reason, all_reduce = None, "", None
    with ExitStack() as stack:
        try:
            if env.rank == 0:
                ref = stack.enter_context(closing(_create_memory(env.world_size))).ref
        except OSError as error:
            reason = str(error)
        ref, reason = broadcast_object((ref, reason))
        peers = all_gather_object(Peer.current())
        try:
            if ref is not None:
                all_reduce = SharedMemoryAllReduce(ref.map(shared=True), env.rank, peers)
        except OSError as error:
            reason = str(error)
        reasons = all_gather_object(reason)  # every rank has now mapped the memory, or never will: the file can close
    if all_reduce is not None and not any(reasons):
        return all_reduce
    if env.rank == 0:
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        warn(
            f"distributed.shared_memory=auto: rank {rank} cannot share memory ({reason}), so Gloo sums the gradients, "
            "more slowly; run all ranks as one user in one process namespace, or give distributed.shared_memory=off"
        )
    return dist.all_reduce


def _create_memory(ranks: int) -> SharedFile:
    """Create the memory for ``ranks`` ranks. Raise OSError if that fails."""
    file = create_shared([bytes(SharedMemoryAllReduce.required_bytes(ranks))])
    Barrier.init_semaphores(file.ref.map(shared=True), ranks)
    return file
