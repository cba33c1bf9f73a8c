"""A training step as a CUDA graph: captured once, then replayed with one launch instead of a hundred.

A replay repeats the captured kernels on the same memory, and runs no Python. Values that differ from step to step
(samples, indices, epoch, learning rate) are therefore copied to fixed memory first, and nothing in the step may read a
value of the device. Sources: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, its section "Usage with
DistributedDataParallel", and https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from distlenet.distributed.collectives import any_rank
from distlenet.task import Batch
from distlenet.training.device_step import DeviceStep
from distlenet.training.step_result import DeviceResult
from distlenet.utils.errors import warn
from distlenet.utils.nested import map_tensors, tensors_in

WARM_UP_STEPS = 11
"""Steps before the capture: DistributedDataParallel times some of its first ten with events."""


def capture_cuda_graph(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture ``work`` on the current stream, without running it.

    The stream must not be the default stream, and must be the one on which the model and its wrapper were made
    (``init_distributed`` sets one). Mode thread_local: a loader's thread may pin memory meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    return graph


class GraphedStep:
    """A step, captured at the first full global batch after ``WARM_UP_STEPS`` others; shorter batches run eagerly.

    NCCL requires that all ranks capture a collective or none does. Which steps are replayed therefore depends only on
    what all ranks know, and if a capture fails on one rank, all continue without.
    """

    def __init__(
        self,
        step: DeviceStep,
        batch_size: int,
        micro_batch: int,
        capture: Callable[[Callable[[], None]], torch.cuda.CUDAGraph] = capture_cuda_graph,
    ) -> None:
        """Capture ``step`` for global batches of ``batch_size`` samples; ``micro_batch`` is the rank's one."""
        self.step, self.optimizer, self.batch_size, self.micro_batch = step, step.optimizer, batch_size, micro_batch
        self.capture = capture
        self.warm_up_left = WARM_UP_STEPS
        self.failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_batch: Batch | None = None
        self.result: DeviceResult | None = None
        self.lrs = [torch.zeros((), device=step.device) for _ in self.optimizer.param_groups]  # as fused ones read it

    def run(self, batch: Batch, step: int, want_grad_norm: bool) -> DeviceResult:
        """Take one step, with the same effect as ``DeviceStep.compute``."""
        for lr, group in zip(self.lrs, self.optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])
        with self._settings_on_device():
            if batch.global_size == self.batch_size and not self.failed and self.warm_up_left == 0:
                if self.graph is None:
                    self._capture(batch, step)
                if self.graph is not None:
                    return self._replay(self.graph, batch, step)
            self.warm_up_left = max(0, self.warm_up_left - 1)
            return self.step.compute(batch, step, want_grad_norm)

    def _capture(self, batch: Batch, step: int) -> None:
        """Capture the step, or note that it cannot be captured. A collective."""
        assert batch.keys is not None
        keys = replace(
            batch.keys,
            epoch=torch.zeros((), dtype=torch.int64, device=self.step.device),
            indices=torch.zeros_like(batch.keys.indices),
        )
        static = replace(batch, data=map_tensors(torch.zeros_like, batch.data), keys=keys)
        reason = ""

        def work() -> None:
            self.result = self.step.compute(static, step, True)

        try:
            self.graph = self.capture(work)
        except RuntimeError as error:  # such as reading a value of the device
            reason = f": {error}".splitlines()[0]
        self.static_batch = static
        if any_rank(self.graph is None, self.step.device):  # collective, host sync
            warn(f"train.cuda_graph=auto: the step cannot be captured on every rank, so it runs eagerly{reason}")
            self.close()
            self.failed = True
            self.step.reset()

    def _replay(self, graph: torch.cuda.CUDAGraph, batch: Batch, step: int) -> DeviceResult:
        static = self.static_batch
        assert static is not None
        assert static.keys is not None
        for target, source in zip(_inputs(static), _inputs(batch), strict=True):
            target.copy_(source, non_blocking=True)
        assert isinstance(static.keys.epoch, Tensor)
        static.keys.epoch.fill_(batch.epoch)
        self.step.seed(step, self.micro_batch)
        graph.replay()
        assert self.result is not None
        return self.result

    def close(self) -> None:
        """Release the graph: NCCL's communicators do not end before the graphs they are in."""
        if self.graph is not None:
            if self.step.device.type == "cuda":
                torch.cuda.synchronize(self.step.device)
            self.graph.reset()
            self.graph = None

    @contextmanager
    def _settings_on_device(self) -> Iterator[None]:
        """Let the optimizer read the learning rates on the device, in all steps: float32 rounds them."""
        groups, before = self.optimizer.param_groups, []
        for lr, group in zip(self.lrs, groups, strict=True):
            on_device = {"lr": lr, "capturable": True}  # SGD neither has nor needs "capturable"
            before.append({key: group[key] for key in on_device if key in group})
            group.update({key: on_device[key] for key in before[-1]})
        try:
            yield
        finally:
            for group, settings in zip(groups, before, strict=True):
                group.update(settings)


def _inputs(batch: Batch) -> list[Tensor]:
    assert batch.keys is not None
    return [*tensors_in(batch.data), batch.keys.indices]
