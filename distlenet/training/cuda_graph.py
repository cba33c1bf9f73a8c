"""A training step as a CUDA graph: captured once, then replayed with one launch instead of a hundred.

A replay repeats the captured kernels on the same memory, and runs no Python. What differs from step to step is
therefore copied to fixed memory first (``StepInputs``), and nothing in the step may read a value of the device.

Sources: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, its section "Usage with
DistributedDataParallel", and https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/cudagraph.html
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distlenet.data.batched_dataset import ResidentBatch
from distlenet.distributed.collectives import any_rank
from distlenet.task import Batch
from distlenet.training.device_step import DeviceStep, Seed
from distlenet.training.step_result import DeviceResult
from distlenet.utils.errors import RankError, warn
from distlenet.utils.keyed_random import default_generator, seed_micro_batch
from distlenet.utils.nested import has_lists, map_tensors, tensors_in


class Kind(NamedTuple):
    """Steps of one kind are the same kernels."""

    global_size: int
    with_grad_norm: bool


class MicroBatchGenerators:
    """A generator for each micro-batch that draws random numbers, in place of the default one of the device.

    Within a capture, no generator can be seeded; before a replay, each of these is.
    """

    def __init__(self, device: torch.device, numbers: Iterable[int]) -> None:
        self.default = default_generator(device)
        self.states = {number: torch.Generator(device) for number in numbers}

    def seed(self, seed: int, step: int) -> None:
        """Seed all for the micro-batches of a step."""
        for number, generator in self.states.items():
            seed_micro_batch(generator, seed, step, number)

    @contextmanager
    def selected(self, graph: torch.cuda.CUDAGraph) -> Iterator[Seed]:
        """Register the generators with ``graph``; the function that is yielded selects that of a micro-batch."""
        before = self.default.graphsafe_get_state()
        if torch.__version__ < "2.14":  # later versions register a generator when it is used
            for generator in self.states.values():
                graph.register_generator_state(generator)

        def select(number: int) -> None:
            if number in self.states:
                self.default.graphsafe_set_state(self.states[number])

        try:
            yield select
        finally:
            self.default.graphsafe_set_state(before)


class EagerStep(NamedTuple):
    """What an eager step showed about those of the same size."""

    micro_batches: tuple[int, ...]  # their numbers
    draws: bool  # random numbers of the device


@dataclass(frozen=True)
class CapturedStep:
    """One kind of step."""

    graph: torch.cuda.CUDAGraph
    batch: Batch | None  # whose tensors it reads; None if it gathers resident samples
    generators: MicroBatchGenerators
    result: DeviceResult


class GraphedStep:
    """A step that is captured after ``Reducer.capture_after`` others, once for each kind of step.

    NCCL requires that all ranks capture a collective or none does. Which steps are replayed therefore depends only on
    what all ranks know, and if a capture fails on one rank, all continue without.
    """

    def __init__(self, step: DeviceStep) -> None:
        """Capture ``step``."""
        self.step = step
        self.eager_left = step.reducer.capture_after
        self.eager: dict[int, EagerStep] = {}  # by global batch size; it creates what a capture may not
        self.failed = False
        self.captured: dict[Kind, CapturedStep] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch | ResidentBatch, step: int, want_grad_norm: bool) -> DeviceResult:
        """Take one step, with the same effect as ``DeviceStep.compute``. A collective."""
        kind = Kind(batch.global_size, want_grad_norm)
        if kind not in self.captured and self.eager_left == 0 and not self.failed and batch.global_size in self.eager:
            self._capture(kind, batch)  # collective
        if kind in self.captured:
            return self._replay(self.captured[kind], batch, step)
        return self._run_eagerly(batch, step, want_grad_norm)

    def _run_eagerly(self, batch: Batch | ResidentBatch, step: int, want_grad_norm: bool) -> DeviceResult:
        numbers: list[int] = []

        def seed(number: int) -> None:
            numbers.append(number)
            self.step.seed(step, number)

        result = self.step.compute(gathered(batch, self.step), seed, want_grad_norm)
        draws = default_generator(self.step.device).get_offset() > 0  # since it was seeded
        self.eager[batch.global_size] = EagerStep(tuple(numbers), draws)
        self.eager_left = max(0, self.eager_left - 1)
        return result

    def _capture(self, kind: Kind, batch: Batch | ResidentBatch) -> None:
        """Capture a kind of step, or note that steps cannot be captured on every rank. A collective."""
        captured, reason = None, ""
        try:
            captured = capture(self.step, kind, batch, self.eager[batch.global_size], self.pool)
        except RuntimeError as error:  # such as reading a value of the device
            cause = error.__context__ or error  # the end of a capture only reports that there was an error before
            if isinstance(cause, dist.DistBackendError):  # NCCL may not be usable any more: no fallback
                cause.add_note("train.cuda_graph=auto: NCCL cannot be captured; give train.cuda_graph=off")
                raise
            reason = f": {cause}".splitlines()[0]
        if any_rank(captured is None, self.step.device):  # collective, host sync
            warn(f"train.cuda_graph=auto: the step cannot be captured on every rank, so it runs eagerly{reason}")
            self.close()
            self.failed = True
            self.step.reset()
        elif captured is not None:
            self.captured[kind] = captured

    def _replay(self, captured: CapturedStep, batch: Batch | ResidentBatch, step: int) -> DeviceResult:
        if captured.batch is not None and isinstance(batch, Batch):
            for target, source in zip(tensors_in(captured.batch.data), tensors_in(batch.data), strict=True):
                check_shape(target, source)
                target.copy_(source, non_blocking=True)
        captured.generators.seed(self.step.seed_value, step)
        captured.graph.replay()
        return captured.result

    def close(self) -> None:
        """Release the graphs: NCCL's communicators do not end before the graphs they are in. No host sync."""
        for captured in self.captured.values():
            captured.graph.reset()
        self.captured.clear()


def check_shape(captured: Tensor, tensor: Tensor) -> None:
    """Raise RankError if a batch has a tensor of another shape than the captured batch."""
    if captured.shape != tensor.shape:
        raise RankError(
            f"train.cuda_graph=auto: a batch has a tensor of shape {list(tensor.shape)}, but the captured one of the "
            f"same size has {list(captured.shape)}; pad to a fixed shape, or give train.cuda_graph=off"
        )


def gathered(batch: Batch | ResidentBatch, step: DeviceStep) -> Batch:
    """Return ``batch`` with its samples: resident ones are gathered by the indices in ``step.inputs``."""
    if isinstance(batch, Batch):
        return batch
    return batch.gather(step.inputs.keys(step.seed_value, len(batch)))


def capture(step: DeviceStep, kind: Kind, batch: Batch | ResidentBatch, eager: EagerStep, pool: Any) -> CapturedStep:
    """Capture a step on batches like ``batch``, without running it, on the current stream.

    The stream must not be the default stream, and must be the one on which the model and its wrapper were made
    (``init_distributed`` sets one). Mode thread_local: a loader's thread may pin memory meanwhile. Raise RuntimeError
    if the step does what a capture does not allow.
    """
    if isinstance(batch, Batch) and has_lists(batch.data):
        raise RuntimeError("a batch contains lists, whose tensors have other shapes in each batch")
    static, keys = None, step.inputs.keys(step.seed_value, len(batch))
    if isinstance(batch, Batch):
        static = replace(batch, data=map_tensors(torch.zeros_like, batch.data), keys=keys)
    generators = MicroBatchGenerators(step.device, eager.micro_batches if eager.draws else ())
    graph = torch.cuda.CUDAGraph()
    with (
        generators.selected(graph) as seed,
        _release_pool_on_error(step.device, pool),
        torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"),
    ):
        result = step.compute(static or gathered(batch, step), seed, kind.with_grad_norm)
    return CapturedStep(graph, static, generators, result)


@contextmanager
def _release_pool_on_error(device: torch.device, pool: Any) -> Iterator[None]:
    """End the use of ``pool`` for allocations if the capture fails: before torch 2.12, it itself does not."""
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        raise
