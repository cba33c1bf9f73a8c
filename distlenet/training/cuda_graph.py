"""A training step as a CUDA graph: recorded once, then replayed with one launch instead of a hundred.

A replay does to the memory what the recorded step did to it, and runs no Python. So what differs from step to step
(images, labels, indices, epoch, learning rate) is copied to fixed places first, and nothing in the step may ask
the device for a value. Sources: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, for
DistributedDataParallel its section "Usage with DistributedDataParallel", and for NCCL
https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distlenet.distributed.collectives import any_rank
from distlenet.utils.errors import warn

WARM_UP = 11
"""Steps before the recording: DistributedDataParallel times some of its first ten with events of its own."""


class Step(Protocol):
    """What is recorded."""

    def compute(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int | Tensor, step: int, count: int
    ) -> None:
        """Do the device's part of step ``step``, on a rank's share of a global batch of ``count`` images."""

    def seed(self, step: int) -> None:
        """Seed the generator for a step of one micro-batch."""

    def begin_again(self) -> None:
        """Forget a step that broke off anywhere. A collective."""


class Recorded(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Do it."""

    def reset(self) -> None:
        """Forget it."""


def record_cuda_graph(work: Callable[[], None]) -> Recorded:
    """Record ``work`` on the present stream, without doing it; return what does it.

    The stream must not be the default one, and must be the one on which the network and what wraps it were made
    (``use_side_stream``). Mode thread_local: a loader's thread may pin memory meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    recorded: Recorded = graph
    return recorded


def is_recorded(device: torch.device) -> bool:
    """Say whether what is done now on ``device`` is only recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class GraphedStep:
    """A step, recorded at the first full global batch after ``WARM_UP`` others; shorter ones run as they are.

    NCCL wants a collective to be recorded by all ranks or by none: so which steps are replayed depends only on what
    all of them know, and when recording fails on one of them, all go on without.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        full: int,
        device: torch.device,
        record: Callable[[Callable[[], None]], Recorded] = record_cuda_graph,
    ) -> None:
        """Record steps of ``optimizer`` on global batches of ``full`` images."""
        self.optimizer, self.full, self.record = optimizer, full, record
        self.warm_up = WARM_UP
        self.failed = False
        self.recorded: Recorded | None = None
        self.inputs: list[Tensor] = []
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.lr = torch.zeros((), device=device)  # float32: what fused optimizers read

    def take(
        self, of: Step, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, step: int, count: int
    ) -> None:
        """Take one step, as ``of.compute`` would."""
        self.lr.fill_(self.optimizer.param_groups[0]["lr"])
        with self.settings_on_device():
            if count == self.full and not self.failed and self.warm_up == 0:
                if self.recorded is None:
                    self.prepare(of, (images, labels, indices), step)
                if self.recorded is not None:
                    for place, part in zip(self.inputs, (images, labels, indices), strict=True):
                        place.copy_(part, non_blocking=True)
                    self.epoch.fill_(epoch)
                    of.seed(step)
                    self.recorded.replay()
                    return
            self.warm_up = max(0, self.warm_up - 1)
            of.compute(images, labels, indices, epoch, step, count)

    def prepare(self, of: Step, batch: tuple[Tensor, Tensor, Tensor], step: int) -> None:
        """Record the step. A collective."""
        self.inputs = [torch.zeros_like(part) for part in batch]
        images, labels, indices = self.inputs
        reason = ""
        try:
            self.recorded = self.record(lambda: of.compute(images, labels, indices, self.epoch, step, self.full))
        except RuntimeError as error:  # what cannot be recorded: a look at a value on the device, say
            reason = f": {error}".splitlines()[0]
        if any_rank(self.recorded is None, self.lr.device):
            warn(f"train.cuda_graph=auto: the step cannot be recorded on every rank, so it runs as it is{reason}")
            self.close()
            self.failed = True
            of.begin_again()

    def close(self) -> None:
        """Forget what was recorded: NCCL's communicators wait for the graphs that they are in before they end."""
        if self.recorded is not None:
            if self.lr.is_cuda:
                torch.cuda.synchronize(self.lr.device)
            self.recorded.reset()
            self.recorded = None

    @contextmanager
    def settings_on_device(self) -> Iterator[None]:
        """Let the optimizer read the learning rate on the device, in all steps: float32 rounds it."""
        (group,) = self.optimizer.param_groups
        on_device = {"lr": self.lr, "capturable": True}  # SGD has no "capturable", and needs none
        before: dict[str, Any] = {key: group[key] for key in on_device if key in group}
        group.update({key: on_device[key] for key in before})
        try:
            yield
        finally:
            group.update(before)
