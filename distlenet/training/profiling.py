"""A trace of some steps of a job, by ``torch.profiler``, and on a GPU a snapshot of its memory."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from distlenet.utils.errors import UserError, warn

T = TypeVar("T")

UNLABELED = nullcontext()
MAX_ALLOCATIONS = 100_000  # and frees: a memory snapshot has the newest ones


def phase(name: str) -> AbstractContextManager[Any]:
    """Label what runs in a ``with`` block, if a trace is being recorded; otherwise a label would cost microseconds."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else UNLABELED


class StepProfiler:
    """Write a trace of some steps of a job to ``RUN/profile``. On a GPU, write a memory snapshot, too.

    The snapshot has the allocations during these steps, with their stacks in Python.
    Source: https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
    """

    def __init__(
        self, steps: range, total_steps: int, rank: int, device: torch.device, run_dir: Path, all_ranks: bool = False
    ) -> None:
        """Trace ``steps``, counted from the first step of this job, of a run of ``total_steps``.

        Rank 0 does, and with ``all_ranks`` the others do, too. Raise UserError if the run has fewer steps.
        """
        if steps.stop > total_steps:
            raise UserError(
                f"train.profile_steps={steps.start}:{steps.stop}: the run has {total_steps} steps; give a range that "
                f"ends at {total_steps} or before"
            )
        self.rank = rank
        self.steps = steps if rank == 0 or all_ranks else range(0)  # empty: nothing (more) to trace
        self.directory = run_dir / "profile"
        self.cuda = device.type == "cuda"
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        self.begun = 0  # steps of this job
        self.profile: profile | None = None

    def follow(self, batches: Iterable[T], step: int) -> Iterable[T]:
        """Return ``batches``; each begins a step of the run, the first one ``step``.

        A host sync after the last traced step, and no cost without steps to trace.
        """
        return self._follow(batches, step) if self.steps else batches

    def _follow(self, batches: Iterable[T], step: int) -> Iterator[T]:
        iterator = iter(batches)
        while (batch := _load(iterator)) is not None:
            self._begin_step()
            with phase(f"ProfilerStep#{step}"):  # the name by which TensorBoard finds steps
                yield batch
            if self.profile is not None and self.begun == self.steps.stop:
                self._write(self.profile, step)
            step += 1

    def _begin_step(self) -> None:
        if self.profile is None and self.steps.start - 1 <= self.begun < self.steps.stop:
            self.profile = profile(activities=self.activities, record_shapes=True)
            self.profile.prepare_trace()  # a step early, if there is one: the first step afterwards is slower
        if self.profile is not None and self.begun == self.steps.start:
            self.profile.start_trace()
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")
        self.begun += 1

    def _write(self, trace: profile, last_step: int) -> None:
        """End the trace and write it, and the snapshot. If that fails, warn: the training continues."""
        trace.stop_trace()  # host sync
        first_step = last_step + 1 - len(self.steps)
        name = f"steps-{first_step}-{last_step}.rank-{self.rank}"
        path = self.directory / f"{name}.pt.trace.json.gz"  # as TensorBoard expects
        try:
            self.directory.mkdir(parents=True, exist_ok=True)  # another node may have another disk
            trace.export_chrome_trace(str(path))
            if self.cuda:
                torch.cuda.memory._dump_snapshot(str(self.directory / f"{name}.memory.pickle"))
        except OSError as error:
            warn(f"{path}: cannot be written: {error.strerror or error}; this run has no trace")
        self._end()
        self.steps = range(0)

    def _end(self) -> None:
        self.profile = None
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def close(self) -> None:
        """End a trace whose last step was not reached, without a file."""
        if self.profile is not None:
            if self.begun <= self.steps.start:  # prepared only
                self.profile.start_trace()
            self.profile.stop_trace()
            self._end()
        if self.steps and self.begun and self.rank == 0:
            steps = f"train.profile_steps={self.steps.start}:{self.steps.stop}"
            warn(f"{steps}: no trace, since this job took {self.begun} steps; give an earlier range")


def _load(iterator: Iterator[T]) -> T | None:
    with phase("load"):
        return next(iterator, None)
