"""A training step as a CUDA graph: captured once, then replayed with one launch instead of a hundred.

A replay repeats the captured kernels on the same memory, and runs no Python. What differs from step to step is
therefore copied to fixed memory first (``StepInputs``), and nothing in the step may read a value of the device.

Sources: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, its section "Usage with
DistributedDataParallel", and https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.data.batched_dataset import ResidentBatch
from distlenet.distributed.collectives import all_gather_object
from distlenet.task import Batch
from distlenet.training.device_step import DeviceStep
from distlenet.training.micro_batch_generators import MicroBatchGenerators
from distlenet.training.step_result import DeviceResult
from distlenet.utils.errors import warn
from distlenet.utils.keyed_random import default_generator
from distlenet.utils.nested import has_lists, map_tensors, tensors_in


class StepKind(NamedTuple):
    """Steps of the same kind launch the same kernels."""

    global_size: int
    with_grad_norm: bool


@dataclass(frozen=True)
class EagerSteps:
    """What was seen of the eager steps of a global batch size."""

    micro_batches: tuple[int, ...]  # their numbers, in the last step
    draws: bool  # random numbers of the device
    why_not: str  # a reason against a capture, or ""


@dataclass(frozen=True)
class CapturedStep:
    """One kind of step."""

    graph: torch.cuda.CUDAGraph
    batch: Batch | None  # whose tensors it reads; None if it gathers resident samples
    generators: MicroBatchGenerators
    result: DeviceResult


class GraphedStep:
    """A step that is captured after ``Reducer.capture_after`` others, once for each kind of step.

    NCCL requires that all ranks capture a collective or none does. Which steps are captured and replayed therefore
    depends only on what all ranks know, and if a capture fails on one rank, all continue without.
    """

    def __init__(self, step: DeviceStep) -> None:
        """Capture ``step``."""
        self.step = step
        self.eager_left = step.reducer.capture_after
        self.eager: dict[int, EagerSteps] = {}  # by global batch size; they allocate state that a capture cannot
        self.shapes: dict[int, list[torch.Size]] = {}  # of the tensors of the first eager batch, by global batch size
        self.failed = False
        self.captured: dict[StepKind, CapturedStep] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch | ResidentBatch, step: int, want_grad_norm: bool) -> DeviceResult:
        """Take one step, with the same effect as ``DeviceStep.compute``. A collective."""
        kind = StepKind(batch.global_size, want_grad_norm or self.step.max_grad_norm is not None)
        if kind not in self.captured and self.eager_left == 0 and not self.failed and batch.global_size in self.eager:
            self._capture(kind, batch)  # collective
        if kind in self.captured:
            return self._replay(self.captured[kind], batch, step)
        return self._run_eagerly(batch, step, want_grad_norm)

    def _run_eagerly(self, batch: Batch | ResidentBatch, step: int, want_grad_norm: bool) -> DeviceResult:
        """Take one step, and note what a capture has to know. A collective."""
        numbers: list[int] = []

        def seed(number: int) -> None:
            numbers.append(number)
            self.step.seed(step, number)

        before = host_random_state()
        loaded = gathered(batch, self.step)
        result = self.step.compute(loaded, seed, want_grad_norm)
        size, shapes = batch.global_size, [tensor.shape for tensor in tensors_in(loaded.data)]
        why_not = self.eager[size].why_not if size in self.eager else ""
        if has_lists(loaded.data):
            why_not = "batches contain lists"
        elif self.shapes.setdefault(size, shapes) != shapes:
            why_not = "batches have tensors of different shapes"
        elif host_random_state() != before:
            why_not = "the step draws random numbers on the host"
        draws = default_generator(self.step.device).get_offset() > 0  # since it was seeded
        self.eager[size] = EagerSteps(tuple(numbers), draws, why_not)
        self.eager_left = max(0, self.eager_left - 1)
        return result

    def _capture(self, kind: StepKind, batch: Batch | ResidentBatch) -> None:
        """Capture a kind of step, or note that steps cannot be captured on every rank. A collective."""
        captured, reason = None, ""
        reasons = all_gather_object(self.eager[kind.global_size].why_not)  # collective, host sync
        if not any(reasons):
            try:
                captured = capture(self.step, kind, batch, self.eager[kind.global_size], self.pool)
            except RuntimeError as error:  # such as reading a value of the device
                cause = error.__context__ or error  # the end of a capture only reports that there was an error before
                if isinstance(cause, dist.DistBackendError):
                    # NCCL's state after a failed capture is not documented: no fallback.
                    cause.add_note("train.cuda_graph=auto: NCCL cannot be captured; give train.cuda_graph=off")
                if isinstance(cause, dist.DistBackendError) or not isinstance(cause, Exception):  # Ctrl-C
                    raise cause from None
                reason = str(cause).partition("\n")[0] or type(cause).__name__
            reasons = all_gather_object(reason)  # collective, host sync
        if any(reasons):
            if dist.get_rank() == 0:
                first = next(filter(None, reasons))
                warn(f"train.cuda_graph=auto: the step cannot be captured, so it runs eagerly: {first}")
            self.close()
            self.failed = True
            self.step.reset()  # collective
        elif captured is not None:
            self.captured[kind] = captured

    def _replay(self, captured: CapturedStep, batch: Batch | ResidentBatch, step: int) -> DeviceResult:
        if captured.batch is not None and isinstance(batch, Batch):
            for target, source in zip(tensors_in(captured.batch.data), tensors_in(batch.data), strict=True):
                check_shape(target, source)
                target.copy_(source, non_blocking=True)
        captured.generators.seed(self.step.seed_value, step)
        captured.graph.replay()  # collective
        return captured.result

    def close(self) -> None:
        """Release the graphs: NCCL's communicators do not end before the graphs they are in. No host sync."""
        for captured in self.captured.values():
            captured.graph.reset()
        self.captured.clear()


def check_shape(captured: Tensor, tensor: Tensor) -> None:
    """Raise RuntimeError if a batch has a tensor of another shape or type than the captured batch.

    Not a UserError, for which ranks end without an abort of NCCL: the others may be in a replay.
    """
    if captured.shape != tensor.shape or captured.dtype != tensor.dtype:  # it would be broadcast or converted
        raise RuntimeError(
            f"train.cuda_graph=auto: a batch has a tensor {list(tensor.shape)} of {tensor.dtype}, but the captured one "
            f"of the same size has {list(captured.shape)} of {captured.dtype}; pad to a fixed shape, or give "
            "train.cuda_graph=off"
        )


def host_random_state() -> tuple[Any, ...]:
    """Return the states of the global generators of the host: a replay would repeat the numbers of its capture."""
    numpy_state: Any = np.random.get_state()  # a name, the state, the position in it
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes()


def gathered(batch: Batch | ResidentBatch, step: DeviceStep) -> Batch:
    """Return ``batch`` with its samples: resident ones are gathered by the indices in ``step.inputs``."""
    if isinstance(batch, Batch):
        return batch
    return batch.gather(step.inputs.keys(step.seed_value, len(batch), batch.epoch))


def capture(
    step: DeviceStep, kind: StepKind, batch: Batch | ResidentBatch, eager: EagerSteps, pool: Any
) -> CapturedStep:
    """Capture a step on batches like ``batch``, without running it, on the current stream.

    The stream must not be the default stream, and must be the one on which the model and its wrapper were made
    (``init_distributed`` sets one). Mode thread_local: a loader's thread may pin memory meanwhile. Raise RuntimeError
    if the step does what a capture does not allow. A host sync.
    """
    keys, static = step.inputs.keys(step.seed_value, len(batch)), None
    if isinstance(batch, Batch):
        static = replace(batch, data=map_tensors(torch.zeros_like, batch.data), keys=keys)
    generators = MicroBatchGenerators(step.device, eager.micro_batches if eager.draws else ())
    graph = torch.cuda.CUDAGraph()
    with (
        _reset_on_error(graph),
        no_buffer_replaced(step.model),
        generators.capturing(graph) as seed,
        _release_pool_on_error(step.device, pool),
        torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"),
    ):
        loaded = batch.gather(keys) if isinstance(batch, ResidentBatch) else static
        assert loaded is not None
        result = step.compute(loaded, seed, kind.with_grad_norm)
    return CapturedStep(graph, static, generators, result)


@contextmanager
def _reset_on_error(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Release ``graph`` if the block fails: the error's traceback would keep it longer than NCCL's communicators."""
    try:
        yield
    except BaseException:
        graph.reset()
        raise


@contextmanager
def no_buffer_replaced(model: nn.Module) -> Iterator[None]:
    """Restore replaced buffers, which are only placeholders of a capture. Raise RuntimeError if there are any.

    A replay would always begin with the tensors from before the capture. Persistent buffers are put back in each step
    (``BufferAverage``).
    """
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    replaced = False
    try:
        yield
    finally:
        for buffers, tensors in before:
            replaced |= any(buffers.get(key) is not tensor for key, tensor in tensors.items())
            buffers.update(tensors)
    if replaced:
        raise RuntimeError("the step replaces a buffer, instead of writing to it")


@contextmanager
def _release_pool_on_error(device: torch.device, pool: Any) -> Iterator[None]:
    """End the use of ``pool`` for allocations if the capture fails: before torch 2.12, it itself does not."""
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise
