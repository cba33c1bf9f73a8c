"""Where ranks of one machine wait for each other, by semaphores in memory that all of them map.

A rank that waits looks again and again, as NCCL does on a GPU, but only for as long as it takes to be woken; then it
sleeps, since another process, or the very rank that it waits for, may want the processor.
"""

import ctypes
import errno
import os
import select
import time
from dataclasses import dataclass
from typing import BinaryIO, cast

from torch import Tensor

LINE = 64  # bytes of a processor's cache line: what two ranks write lies on different ones
SPIN_S = 1e-4  # how long a rank looks before it sleeps; ten times that is a fifth slower beside other busy processes
LOOKS = 64  # between two looks at the clock
SLEEP_S = 0.2  # between two looks whether the others are still alive

C = ctypes.CDLL(None, use_errno=True)


class Timespec(ctypes.Structure):
    """A time of the wall clock, as sem_timedwait(3) takes it."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True)
class Peer:
    """A rank of this machine: its process, in which process namespace that is, and the processors that it may use."""

    pid: int
    namespace: int
    processors: frozenset[int]

    @classmethod
    def me(cls) -> "Peer":
        """Describe this process. Raises OSError without /proc."""
        return cls(os.getpid(), os.stat("/proc/self/ns/pid").st_ino, frozenset(os.sched_getaffinity(0)))

    def watch(self) -> BinaryIO:
        """Return what can be read from as soon as the process has ended. Raises OSError where it cannot be seen."""
        if self.namespace != os.stat("/proc/self/ns/pid").st_ino:
            raise OSError("ranks are in different process namespaces")
        return cast(BinaryIO, os.fdopen(os.pidfd_open(self.pid), "rb", buffering=0))  # which closes itself


class Barrier:
    """Where ranks of a node wait for each other: a semaphore a rank, of POSIX, in shared memory.

    POSIX has a semaphore order memory, too: what a rank wrote before it came, the others read after they have passed.
    A count of all who came is enough: none comes to the next barrier before one has passed this, and the first can
    only pass when all have come.
    """

    def __init__(self, memory: Tensor, rank: int, peers: list[Peer]) -> None:
        """Use the semaphores that ``lay_out`` has made in ``memory``. Raises OSError where a peer cannot be seen."""
        self.memory, self.watched = memory, [peer.watch() for peer in peers]
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
            if gone := select.select(self.watched, [], [], 0)[0]:
                if not C.sem_trywait(self.own):  # it came before it ended
                    return
                raise RuntimeError(f"rank {self.watched.index(gone[0])}: remote process exited")

    def _sleep(self) -> bool:
        """Wait for a post, but not for long; say whether it came."""
        now = time.time() + SLEEP_S
        wake = Timespec(int(now), int(now % 1 * 1e9))
        if not C.sem_timedwait(self.own, ctypes.byref(wake)):
            return True
        if (number := ctypes.get_errno()) not in (errno.ETIMEDOUT, errno.EINTR):
            raise OSError(number, os.strerror(number))
        return False
