"""Sums over ranks that share one machine: added in memory that all of them map.

Gloo sends them through sockets instead, and wakes a thread of its own for each message. Where all processors are
busy, that takes milliseconds; to add a small network's gradients takes a hundredth of one (benchmarks/RESULTS.md).
A rank that waits here looks again and again for a while, as NCCL does on a GPU, and only then sleeps.
"""

import ctypes
import errno
import os
import select
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.data.shared import SharedFile, in_memory
from distlenet.distributed import any_rank, from_rank_0
from distlenet.errors import warn
from distlenet.world import World

AllReduce = Callable[[Tensor], object]
"""Adds a tensor over all ranks, in place. A collective."""

PIECE = 2**20  # bytes of a rank's tensor that are added at a time: the memory needed does not grow with the network
LINE = 64  # bytes of a processor's cache line: what two ranks write lies on different ones
SPIN_S = 1e-3  # how long a rank looks before it sleeps; to be woken takes about a tenth of that
LOOKS = 64  # between two looks at the clock
SLEEP_S = 0.2  # between two looks whether the others are still alive

C = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    """A time of the wall clock, as sem_timedwait(3) takes it."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class Peer:
    """A rank of this node: its process, and the processors that it may use."""

    pid: int
    processors: frozenset[int]

    def gone(self) -> bool:
        """Say whether the process has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([descriptor], [], [], 0)[0])
        finally:
            os.close(descriptor)


class Barrier:
    """Where ranks of a node wait for each other: a semaphore a rank, of POSIX, in shared memory.

    POSIX has a semaphore order memory, too: what a rank wrote before it came, the others read after they have passed.
    A count of all who came is enough: none comes to the next barrier before one has passed this, and the first can
    only pass when all have come.
    """

    def __init__(self, memory: Tensor, rank: int, peers: list[Peer]) -> None:
        """Use the semaphores that ``lay_out`` has made in ``memory``."""
        self.memory, self.peers = memory, peers
        self.others = [self._semaphore(memory, peer) for peer in range(len(peers))]
        self.own = self.others.pop(rank)  # each of the others posts to it
        processors = frozenset[int]().union(*(peer.processors for peer in peers))
        self.spin_s = SPIN_S if len(processors) >= len(peers) else 0.0  # else it would keep another from coming

    @staticmethod
    def size(ranks: int) -> int:
        """Return the bytes that it needs."""
        return ranks * LINE

    @staticmethod
    def _semaphore(memory: Tensor, number: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(memory.data_ptr() + number * LINE)

    @classmethod
    def lay_out(cls, memory: Tensor, ranks: int) -> None:
        """Make its semaphores. Raises OSError where the C library has none between processes."""
        for number in range(ranks):
            if C.sem_init(cls._semaphore(memory, number), 1, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self) -> None:
        """Come, and pass when all have come. Raises RuntimeError where one of them has ended instead."""
        for other in self.others:
            C.sem_post(other)
        for _ in self.others:
            self._take()

    def _take(self) -> None:
        until = time.perf_counter() + self.spin_s
        while True:
            for _ in range(LOOKS):
                if not C.sem_trywait(self.own):
                    return
            if time.perf_counter() >= until:
                break
        while not self._sleep():
            if gone := [number for number, peer in enumerate(self.peers) if peer.gone()]:
                if not C.sem_trywait(self.own):  # it came before it ended
                    return
                raise RuntimeError(f"local rank {gone[0]}: remote process exited")

    def _sleep(self) -> bool:
        """Wait for a post, but not for long; say whether it came."""
        now = time.time() + SLEEP_S
        wake = Timespec(int(now), int(now % 1 * 1e9))
        if not C.sem_timedwait(self.own, ctypes.byref(wake)):
            return True
        if (number := ctypes.get_errno()) not in (errno.ETIMEDOUT, errno.EINTR):
            raise OSError(number, os.strerror(number))
        return False


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


def pick_all_reduce(wanted: str, world: World, device: torch.device) -> AllReduce:
    """Choose how gradients are added: in shared memory, where all ranks compute on one machine's CPUs. A collective.

    ``wanted`` is auto or off. Where memory cannot be shared, all ranks take the process group's, and rank 0 says so.
    """
    if wanted == "off" or device.type != "cpu" or world.local_world_size != world.world_size:
        return dist.all_reduce
    if world.world_size == 1:
        return lambda values: values
    place, made, why = None, None, "look at the other ranks"
    with ExitStack() as stack:
        try:
            if world.rank == 0:
                place = stack.enter_context(closing(_make_memory(world.world_size))).place
        except OSError as error:
            why = str(error)
        place = from_rank_0(place)
        peers: list[Peer] = [Peer(0, frozenset())] * world.world_size
        dist.all_gather_object(peers, Peer(os.getpid(), frozenset(os.sched_getaffinity(0))))
        try:
            made = NodeAllReduce(place.map(shared=True), world.rank, peers) if place else None
        except OSError as error:
            why = str(error)
        nobody = any_rank(made is None, device)  # then all have mapped it, or none will: the file can be closed
    if made is None or nobody:
        if world.rank == 0:
            warn(f"distributed.shared_memory=auto: ranks cannot share memory here ({why}); Gloo adds gradients, slower")
        return dist.all_reduce
    return made


def _make_memory(ranks: int) -> SharedFile:
    """Make memory for ``ranks``. Raises OSError where that cannot be."""
    file = in_memory([bytes(NodeAllReduce.size(ranks))])
    Barrier.lay_out(file.place.map(shared=True), ranks)
    return file
