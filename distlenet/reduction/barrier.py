"""A barrier for ranks of one machine, made of semaphores in memory that all of them map.

A waiting rank first polls, as NCCL does on a GPU, but only for as long as a wake-up takes. Then it sleeps, because
another process, perhaps the rank that it waits for, may need the CPU.
"""

import ctypes
import errno
import os
import select
import time
from dataclasses import dataclass
from typing import BinaryIO, cast

from torch import Tensor

CACHE_LINE = 64  # bytes; ranks write to separate cache lines
SPIN_S = 1e-4  # time of polling before a rank sleeps; with ten times as much, training on a busy machine is 20% slower
SPIN_ITERATIONS = 64  # polls between two readings of the clock
SLEEP_S = 0.2  # between two checks whether the other ranks are alive

LIBC = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    """A wall-clock time for sem_timedwait(3)."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class Peer:
    """A rank of this machine: its process id, the inode of its process namespace, and the CPUs it may use."""

    pid: int
    namespace: int
    cpus: frozenset[int]

    @classmethod
    def current(cls) -> "Peer":
        """Describe this process. Raise OSError without /proc."""
        return cls(os.getpid(), os.stat("/proc/self/ns/pid").st_ino, frozenset(os.sched_getaffinity(0)))

    def open_pidfd(self) -> BinaryIO:
        """Return a file that is readable once the process has exited. Raise OSError if the process is not visible."""
        if self.namespace != os.stat("/proc/self/ns/pid").st_ino:
            raise OSError("ranks are in different process namespaces")
        return cast(BinaryIO, os.fdopen(os.pidfd_open(self.pid), "rb", buffering=0))  # a file closes itself


class Barrier:
    """A barrier with one POSIX semaphore per rank in shared memory; each rank posts to those of all others.

    POSIX semaphores order memory: what a rank wrote before the barrier, the others read after it. A semaphore only
    counts arrivals, which is enough: no rank arrives at the next barrier before it has passed this one, and none passes
    this one before all have arrived.
    """

    def __init__(self, memory: Tensor, rank: int, peers: list[Peer]) -> None:
        """Use the semaphores that ``init_semaphores`` created in ``memory``. Raise OSError if a peer is not visible."""
        self.memory = memory  # keeps it mapped
        self.pidfds = [peer.open_pidfd() for peer in peers]
        self.other_semaphores = [self._semaphore(memory, peer) for peer in range(len(peers))]
        self.own_semaphore = self.other_semaphores.pop(rank)
        cpus = frozenset[int]().union(*(peer.cpus for peer in peers))
        self.spin_s = SPIN_S if len(cpus) >= len(peers) else 0.0  # with fewer CPUs, polling would delay another rank

    @staticmethod
    def required_bytes(ranks: int) -> int:
        """Return the size of the memory for ``ranks`` ranks."""
        return ranks * CACHE_LINE

    @staticmethod
    def _semaphore(memory: Tensor, rank: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(memory.data_ptr() + rank * CACHE_LINE)

    @classmethod
    def init_semaphores(cls, memory: Tensor, ranks: int) -> None:
        """Create the semaphores in ``memory``. Raise OSError if the C library cannot share them between processes."""
        for rank in range(ranks):
            if LIBC.sem_init(cls._semaphore(memory, rank), 1, 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def wait(self) -> None:
        """Return when all ranks have called this method. Raise RuntimeError if one of them has exited instead."""
        for semaphore in self.other_semaphores:
            LIBC.sem_post(semaphore)
        for _ in self.other_semaphores:
            self._acquire()

    def _acquire(self) -> None:
        """Wait for one post: poll for ``spin_s``, then sleep. Raise RuntimeError if a rank has exited."""
        deadline = time.perf_counter() + self.spin_s
        while True:
            for _ in range(SPIN_ITERATIONS):
                if not LIBC.sem_trywait(self.own_semaphore):
                    return
            if time.perf_counter() >= deadline:
                break
        while not self._sleep():
            exited, _, _ = select.select(self.pidfds, [], [], 0)
            if exited:
                if not LIBC.sem_trywait(self.own_semaphore):  # the rank had arrived before it exited
                    return
                raise RuntimeError(f"rank {self.pidfds.index(exited[0])}: remote process exited")

    def _sleep(self) -> bool:
        """Wait for one post, at most ``SLEEP_S``; return whether there was one."""
        deadline = time.time() + SLEEP_S
        timespec = Timespec(int(deadline), int(deadline % 1 * 1e9))
        if not LIBC.sem_timedwait(self.own_semaphore, ctypes.byref(timespec)):
            return True
        code = ctypes.get_errno()
        if code not in (errno.ETIMEDOUT, errno.EINTR):
            raise OSError(code, os.strerror(code))
        return False
