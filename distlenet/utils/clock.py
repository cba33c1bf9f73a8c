"""Times of a step: on the host and, without waiting, on a GPU."""

import time
from typing import NamedTuple

import torch


class Mark(NamedTuple):
    """One moment."""

    host_s: float  # time.perf_counter()
    event: torch.cuda.Event | None  # None on the CPU; in a replayed CUDA graph, of the last replay, or None


class Clock:
    """Marks moments on a device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self, in_graph: bool = False, again: torch.cuda.Event | None = None) -> Mark:
        """Mark the current moment; on a GPU, of the work enqueued so far. No host sync.

        In a captured CUDA graph only if ``in_graph``: it is one more node. Such an event must live as long as the
        graph. ``again`` is an event to record once more.
        """
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        if not self.on_gpu or (capturing and not in_graph):
            return Mark(time.perf_counter(), None)
        event = again or torch.cuda.Event(enable_timing=True, **({"external": True} if capturing else {}))
        event.record()
        return Mark(time.perf_counter(), event)
