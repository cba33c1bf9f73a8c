"""The speed of training, and how each rank spends its time."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distlenet.data.batched_dataset import ResidentBatch
from distlenet.distributed.collectives import gather
from distlenet.task import Batch
from distlenet.tracking.base import Record
from distlenet.training.step_result import StepResult, StepTimes

T = TypeVar("T")


class Throughput:
    """Images per second of all ranks, and this rank's times for loading, computing and waiting.

    From ``gradient_ready`` to ``reduced`` a rank waits for the others; the rest of a step is its own time. A slow rank
    therefore shows by its own time, although all ranks take equally many steps.
    """

    def __init__(self, device: torch.device, hosts: Sequence[str]) -> None:
        """Start with nothing measured; ``hosts`` has the host name of each rank."""
        self.device, self.hosts = device, hosts
        self.images, self.seconds = 0, 0.0
        self.started = 0.0
        self.begin_s = 0.0  # of the current step, the loading of its batch included
        self.last_step: StepTimes | None = None
        self._open_window()

    def start(self) -> None:
        """Begin to measure."""
        self.started = time.perf_counter()
        self._open_window()

    def time_loading(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield ``batches``; each begins a step."""
        iterator = iter(batches)
        while True:
            self.begin_s = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.load_s += time.perf_counter() - self.begin_s
            yield batch

    def add(self, batch: Batch | ResidentBatch, result: StepResult) -> None:
        """Count one step. No host sync."""
        times = result.times
        wait_s = times.reduced.host_s - times.gradient_ready.host_s
        self.own_s += time.perf_counter() - self.begin_s - wait_s
        self.wait_s += wait_s
        self.images += batch.global_size
        self.window_images += batch.global_size
        self.rank_images += len(batch)
        self.last_step = times

    def window(self) -> Record:
        """Return images/s and the ranks' times since the last call. A collective, then a host sync.

        ``load``, ``compute`` and ``wait`` are shares of the time, averaged over ranks; ``rank_images_per_s_min``,
        ``_median`` and ``_max`` are what each rank would reach without waiting for others; ``slowest_rank`` and
        ``slowest_host`` name the one with the minimum. On a GPU the own time is that of the window's last step; if it
        is not measured (in a replayed CUDA graph), only ``images_per_s`` and ``load`` are returned.
        """
        seconds = time.perf_counter() - self.window_started
        own_s, wait_s = self._own_and_wait(seconds)
        row = [self.rank_images, self.load_s, own_s, wait_s, seconds]
        rows = gather(torch.tensor(row, dtype=torch.float64, device=self.device)).cpu()  # collective, then a host sync
        record = {"images_per_s": self.window_images / seconds, **summarise(rows, self.hosts)}
        self._open_window()
        return record

    def stop(self) -> None:
        """End the measurement. Exact only after a host sync."""
        self.seconds += time.perf_counter() - self.started

    def mean(self) -> float | None:
        """Return images/s over everything measured, or None."""
        return self.images / self.seconds if self.images else None

    def _open_window(self) -> None:
        self.window_started = time.perf_counter()
        self.window_images, self.rank_images = 0, 0
        self.load_s, self.own_s, self.wait_s = 0.0, 0.0, 0.0

    def _own_and_wait(self, seconds: float) -> tuple[float, float]:
        """Return the window's own and waiting seconds; on a GPU in the proportion of its last step."""
        if self.device.type != "cuda":
            return self.own_s, self.wait_s
        begin, ready, reduced, end = [mark.event for mark in self.last_step] if self.last_step else [None] * 4
        if begin is None or ready is None or reduced is None or end is None:
            return float("nan"), float("nan")
        end.synchronize()  # host sync
        share = ready.elapsed_time(reduced) / begin.elapsed_time(end)
        rest = seconds - self.load_s
        return self.load_s + rest * (1 - share), rest * share


def summarise(rows: Tensor, hosts: Sequence[str]) -> Record:
    """Summarise the rows of all ranks, (W, 5): images, then seconds of load, own, wait and total."""
    images, load, own, wait, seconds = rows.unbind(1)
    record: Record = {"load": float((load / seconds).mean())}
    if own.isnan().any():
        return record
    record |= {"compute": float(((own - load) / seconds).mean()), "wait": float((wait / seconds).mean())}
    speeds = {rank: float(i / o) for rank, (i, o) in enumerate(zip(images, own, strict=True)) if i}
    if speeds:
        slowest = min(speeds, key=speeds.__getitem__)
        record["rank_images_per_s_min"], record["rank_images_per_s_max"] = min(speeds.values()), max(speeds.values())
        record["rank_images_per_s_median"] = statistics.median(speeds.values())
        record |= {"slowest_rank": slowest, "slowest_host": hosts[slowest]}
    return record
