"""How fast training goes, and what each rank spends its time on."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from distlenet.distributed.collectives import gather
from distlenet.tracking.base import Record

T = TypeVar("T")


class Throughput:
    """Images of all ranks per second, while training, and this rank's times for loading, computing and waiting.

    From when its last gradient is there (``ready``) until those of all are added (``reduced``) a rank waits; the rest
    of a step is its own time. So a rank that is slow shows by that, though all ranks take equally many steps.
    """

    def __init__(self, device: torch.device, hosts: Sequence[str]) -> None:
        """Start with nothing measured, for a rank on ``device``; ``hosts`` has the host name of each rank."""
        self.device, self.hosts = device, hosts
        self.images, self.seconds = 0, 0.0
        self.started = self.window_started = self.step_started = self.ready_at = self.reduced_at = 0.0
        self.window_images = 0
        self.mine, self.load_s, self.own_s, self.wait_s = 0, 0.0, 0.0, 0.0  # of this rank, in the window
        self.clocks: list[torch.cuda.Event] = []  # on a GPU, of the last step: begin, ready, reduced, done
        self.seen = [False] * 4
        if device.type == "cuda":
            self.clocks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

    def start(self) -> None:
        """Begin to measure."""
        self.started = time.perf_counter()
        self._open_window()

    def loading(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass on ``batches``, each the beginning of a step."""
        iterator = iter(batches)
        while True:
            self.step_started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.load_s += time.perf_counter() - self.step_started
            self.seen = [False] * 4
            self._tick(0)
            yield batch

    def ready(self) -> None:
        """Note that this rank's gradient is there; what comes now is waiting. No host sync."""
        self.ready_at = time.perf_counter()
        self._tick(1)

    def reduced(self) -> None:
        """Note that the gradients of all ranks are added. No host sync."""
        self.reduced_at = time.perf_counter()
        self._tick(2)

    def done(self, images: int, mine: int) -> None:
        """Count one step: the images of all ranks, and this rank's own. No host sync."""
        now = time.perf_counter()
        self._tick(3)
        wait = self.reduced_at - self.ready_at
        self.own_s += now - self.step_started - wait
        self.wait_s += wait
        self.images += images
        self.window_images += images
        self.mine += mine

    def window(self) -> Record:
        """Return images/s and the ranks' times since the last call. A collective, then a host sync.

        ``load``, ``compute`` and ``wait`` are shares of the time, the mean over ranks; ``rank_images_per_s_min``,
        ``_median`` and ``_max`` are of what each rank would do without waiting for others, and ``slowest_rank`` and
        ``slowest_host`` say which has the least. On a GPU the own time is that of the window's last step; where that
        is not measured (in a replayed CUDA graph), all but ``images_per_s`` and ``load`` are left out.
        """
        seconds = time.perf_counter() - self.window_started
        own_s, wait_s = self._own_and_wait(seconds)
        mine = torch.tensor([self.mine, self.load_s, own_s, wait_s, seconds], dtype=torch.float64, device=self.device)
        rows = gather(mine).cpu()  # collective, then a host sync
        record = {"images_per_s": self.window_images / seconds, **summarise(rows, self.hosts)}
        self._open_window()
        return record

    def stop(self) -> None:
        """End the measurement. True only after a host sync."""
        self.seconds += time.perf_counter() - self.started

    def mean(self) -> float | None:
        """Return images/s over all that was measured; None where nothing was."""
        return self.images / self.seconds if self.images else None

    def _open_window(self) -> None:
        self.window_started = time.perf_counter()
        self.window_images, self.mine = 0, 0
        self.load_s, self.own_s, self.wait_s = 0.0, 0.0, 0.0

    def _tick(self, clock: int) -> None:
        if self.clocks and not torch.cuda.is_current_stream_capturing():
            self.clocks[clock].record()
            self.seen[clock] = True

    def _own_and_wait(self, seconds: float) -> tuple[float, float]:
        """Return the window's own and waiting seconds; on a GPU in the proportion of its last step."""
        if not self.clocks:
            return self.own_s, self.wait_s
        if not all(self.seen):
            return float("nan"), float("nan")
        self.clocks[3].synchronize()  # host sync
        share = self.clocks[1].elapsed_time(self.clocks[2]) / self.clocks[0].elapsed_time(self.clocks[3])
        rest = seconds - self.load_s
        return self.load_s + rest * (1 - share), rest * share


def summarise(rows: Tensor, hosts: Sequence[str]) -> Record:
    """Say what ``Throughput.window`` says of all ranks' rows (W, 5): images, and seconds of load, own, wait and all."""
    images, load, own, wait, seconds = rows.unbind(1)
    record: Record = {"load": float((load / seconds).mean())}
    if own.isnan().any():
        return record
    record |= {"compute": float(((own - load) / seconds).mean()), "wait": float((wait / seconds).mean())}
    paces = [float(i / o) for i, o in zip(images, own, strict=True)]
    worked = [rank for rank, count in enumerate(images) if count]
    if worked:
        slowest = min(worked, key=paces.__getitem__)
        each = [paces[rank] for rank in worked]
        record["rank_images_per_s_min"], record["rank_images_per_s_max"] = min(each), max(each)
        record["rank_images_per_s_median"] = statistics.median(each)
        record |= {"slowest_rank": slowest, "slowest_host": hosts[slowest]}
    return record
