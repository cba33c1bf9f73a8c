"""Times of a step: on the host and, without waiting, on a GPU."""

import time
from typing import NamedTuple

import torch


class Mark(NamedTuple):
    """One moment."""

    host_s: float  # time.perf_counter()
    event: torch.cuda.Event | None  # None on the CPU, and in a captured CUDA graph


class Clock:
    """Marks moments on a device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """Mark the present moment; on a GPU, of the work enqueued so far. No host sync."""
        if not self.on_gpu or torch.cuda.is_current_stream_capturing():
            return Mark(time.perf_counter(), None)
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return Mark(time.perf_counter(), event)
