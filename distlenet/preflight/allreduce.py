"""All-reduces: are their sums right, and how long do they take?"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.distributed.collectives import broadcast_object

SIZES = [4**k for k in range(1, 14)]
"""Bytes: 4 B to 64 MiB."""

PAIR_BYTES = 1 << 20
SLOW = 2.0
"""How many times the median a pair of nodes takes that is called slow."""


@dataclass(frozen=True)
class Timing:
    """Median seconds of all-reduces by their size in bytes, and the line through them."""

    ranks: int
    seconds: dict[int, float]
    latency_s: float  # of one of no bytes
    seconds_per_byte: float

    def to_dict(self) -> dict[str, object]:
        """Return all of it in plain values."""
        return asdict(self)


def wrong_sums(rank: int, ranks: int, device: torch.device) -> int:
    """All-reduce numbers whose sum is known, and count the elements that are wrong on any rank. A collective."""
    places = torch.arange(1 << 16, device=device)
    mine = ((places * 31 + rank * 17) % 1024).double()  # float64 adds whole numbers exactly
    dist.all_reduce(mine)
    expected = sum(((places * 31 + other * 17) % 1024 for other in range(ranks)), torch.zeros_like(places))
    count = (mine != expected).sum().double()
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return int(count)


def time_all_reduces(sizes: Sequence[int], device: torch.device) -> Timing:
    """Time all-reduces of ``sizes`` bytes, and fit a line. A collective."""
    seconds = {}
    for size in sizes:
        values = torch.zeros(max(1, size // 4), device=device)
        seconds[size] = median_s(lambda values=values: dist.all_reduce(values))  # type: ignore[misc]
    seconds = broadcast_object(seconds)
    intercept, slope = fit_line(list(seconds), list(seconds.values()))
    return Timing(dist.get_world_size(), seconds, intercept, slope)


def median_s(action: Callable[[], object], times: int = 15, together: bool = True) -> float:
    """Return the median time of ``action``, seconds; with ``together`` all ranks begin at once."""
    seconds = []
    for _ in range(times + 3):
        if together:
            dist.barrier()
        _sync()
        started = time.perf_counter()
        action()
        _sync()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def slow_pairs(leaders: Sequence[int], rank: int, device: torch.device) -> list[tuple[int, int, float]]:
    """Send 1 MiB to and fro between each two of ``leaders``, one rank a node; return those that are slow. A collective.

    In rounds of a tournament, in which each leader meets one other. Returns (rank, rank, times the median).
    """
    found: dict[tuple[int, int], float] = {}
    buffer = torch.zeros(PAIR_BYTES // 4, device=device)
    for pairs in rounds(leaders):
        dist.barrier()
        for one, other in pairs:
            if rank in (one, other):
                there = other if rank == one else one
                exchange = lambda there=there, first=rank == one: _to_and_fro(buffer, there, first)  # noqa: E731
                found[one, other] = median_s(exchange, times=5, together=False)
    gathered: list[dict[tuple[int, int], float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    times = {pair: seconds for each in gathered for pair, seconds in each.items()}
    if not times:
        return []
    middle = statistics.median(times.values())
    return [(*pair, seconds / middle) for pair, seconds in sorted(times.items()) if seconds > SLOW * middle]


def rounds(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Pair all with all, in rounds in which nobody plays twice (the circle method)."""
    circle: list[int | None] = [*players, *([None] * (len(players) % 2))]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Fit y = intercept + slope x with equal relative errors; both at least 0."""
    best = (math.inf, 0.0, 0.0)
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    for columns in ([1, 0], [0], [1]):  # both, the intercept alone, the slope alone
        design = torch.stack([torch.ones_like(x), x])[columns].T / y[:, None]
        solution = torch.linalg.lstsq(design, torch.ones_like(y)).solution
        found = [0.0, 0.0]
        for column, value in zip(columns, solution.tolist(), strict=True):
            found[column] = value
        error = float(((found[0] + found[1] * x) / y - 1).square().sum())
        if min(found) >= 0 and error < best[0]:
            best = (error, found[0], found[1])
    return best[1], best[2]


def _to_and_fro(buffer: Tensor, there: int, first: bool) -> None:
    if first:
        dist.send(buffer, there)
        dist.recv(buffer, there)
    else:
        dist.recv(buffer, there)
        dist.send(buffer, there)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
