"""Check the sums of all-reduces, and time all-reduces and pairs of nodes."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.collectives import all_gather_object, broadcast_object

SIZES = [4**k for k in range(1, 14)]
"""Message sizes in bytes, 4 B to 64 MiB."""

PAIR_BYTES = 1 << 20
SLOW_FACTOR = 2.0
"""A pair of nodes is slow if it takes longer than this multiple of the median."""


@dataclass(frozen=True)
class Timing:
    """The median time of all-reduces by size in bytes, and the line fitted to it."""

    ranks: int
    seconds: dict[int, float]
    latency_s: float
    seconds_per_byte: float


def wrong_sums(rank: int, world_size: int, device: torch.device) -> int:
    """All-reduce 65,536 numbers with known sums; return the largest number of wrong sums on a rank. A collective."""
    index = torch.arange(1 << 16, device=device)
    values = ((index * 31 + rank * 17) % 1024).double()  # float64 adds integers exactly
    dist.all_reduce(values)
    expected = sum(((index * 31 + other * 17) % 1024 for other in range(world_size)), torch.zeros_like(index))
    wrong = (values != expected).sum().double()
    dist.all_reduce(wrong, dist.ReduceOp.MAX)
    return int(wrong)


def time_all_reduces(sizes: Sequence[int], device: torch.device) -> Timing:
    """Time all-reduces of ``sizes`` bytes, and fit a line. A collective."""
    own_seconds = {
        size: median_s(partial(dist.all_reduce, torch.zeros(size // 4, device=device)), device) for size in sizes
    }
    seconds = broadcast_object(own_seconds)
    return Timing(dist.get_world_size(), seconds, *fit_line(list(seconds), list(seconds.values())))


def median_s(action: Callable[[], object], device: torch.device, repetitions: int = 15, barrier: bool = True) -> float:
    """Return the median time in seconds of ``action``, which uses ``device``.

    With ``barrier``, all ranks start each repetition together.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(repetitions + 3):
        if barrier:
            dist.barrier()
        synchronize()
        started = time.perf_counter()
        action()
        synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])  # without the warm-up


def slow_pairs(leaders: Sequence[int], rank: int, device: torch.device) -> list[tuple[int, int, float]]:
    """Exchange 1 MiB in each pair of ``leaders``; return slow pairs as (rank, rank, relative time). A collective."""
    own_seconds: dict[tuple[int, int], float] = {}
    buffer = torch.zeros(PAIR_BYTES // 4, device=device)
    for pairs in tournament_rounds(leaders):
        dist.barrier()
        for pair in pairs:
            if rank in pair:
                exchange = partial(_ping_pong, buffer, peer=sum(pair) - rank, first=rank == pair[0])
                own_seconds[pair] = median_s(exchange, device, repetitions=5, barrier=False)
    seconds = {pair: value for by_pair in all_gather_object(own_seconds) for pair, value in by_pair.items()}
    median = statistics.median(seconds.values())
    return [(*pair, value / median) for pair, value in sorted(seconds.items()) if value > SLOW_FACTOR * median]


def tournament_rounds(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return all pairs in rounds in which each player occurs at most once."""
    rounds: list[list[tuple[int, int]]] = [[] for _ in players]
    for (i, one), (j, other) in itertools.combinations(enumerate(players), 2):
        rounds[(i + j) % len(players)].append((one, other))  # i and the round determine j
    return rounds


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Fit y = intercept + slope x with equal relative errors; return intercept and slope, both at least 0."""
    x, y = np.array(xs, float), np.array(ys, float)
    if len(x) == 1:
        return 0.0, float(y[0] / x[0])
    slope, intercept = np.polyfit(x, y, deg=1, w=1 / y)
    if intercept < 0:
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    if slope < 0:
        return float((1 / y).sum() / (1 / y**2).sum()), 0.0
    return float(intercept), float(slope)


def _ping_pong(buffer: Tensor, peer: int, first: bool) -> None:
    for send in (first, not first):
        dist.send(buffer, peer) if send else dist.recv(buffer, peer)
