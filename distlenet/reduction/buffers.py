"""Buffers that a forward pass changes, such as the running statistics of BatchNorm: averaged over a global batch.

Every micro-batch of a step computes with the buffers that the step began with. Its changes are undone and remembered;
their average over the micro-batches of all ranks, weighted by samples, is applied once, if the step is taken.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from distlenet.reduction.shared_memory import AllReduce
from distlenet.utils.errors import UserError


@dataclass(frozen=True)
class Buffer:
    """A buffer of a model; a forward pass may write to its tensor, or replace it."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """Return the current tensor."""
        tensor = self.module._buffers[self.key]
        assert tensor is not None
        return tensor

    @property
    def is_statistic(self) -> bool:
        """Return whether each forward pass in training mode changes it, which version counters do not record."""
        return isinstance(self.module, nn.modules.batchnorm._NormBase)


def persistent_buffers(model: nn.Module) -> list[Buffer]:
    """Return the buffers that a checkpoint holds; others are caches, and each rank has its own."""
    found: dict[int, Buffer] = {}
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                found.setdefault(id(tensor), Buffer(f"{prefix}.{key}" if prefix else key, module, key))
    return list(found.values())


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Undo all changes of buffers at the end of a ``with`` block."""
    buffers = [(buffer, buffer.tensor, buffer.tensor.clone()) for buffer in persistent_buffers(model)]
    try:
        yield
    finally:
        for buffer, tensor, before in buffers:
            buffer.module._buffers[buffer.key] = tensor
            tensor.copy_(before)


class BufferCopies:
    """The buffers with which one micro-batch computes, while others compute in turn with theirs."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers, self.tensors = buffers, [buffer.tensor.clone() for buffer in buffers]
        self.versions = [(tensor, tensor._version) for tensor in self.tensors]

    def swap(self) -> None:
        """Exchange the tensors of the modules for those that are kept here."""
        for i, buffer in enumerate(self.buffers):
            tensor, buffer.module._buffers[buffer.key] = buffer.tensor, self.tensors[i]
            self.tensors[i] = tensor


class BufferAverage:
    """Averages the changes of a model's buffers; without persistent buffers, every method does nothing.

    Which buffers change is found in the first step, on all ranks together. Changes are kept in float64 rows, which one
    all-reduce sums over ranks. If no two micro-batches share a row, each element of the sum has one term that is not 0:
    the result then depends only on the rows, and not on the number of ranks.
    """

    def __init__(self, model: nn.Module, rows: int, all_reduce: AllReduce) -> None:
        self.candidates, self.rows, self.all_reduce = persistent_buffers(model), rows, all_reduce
        self.complete = False  # the first step has found which candidates change
        self.found: set[int] = set()  # these candidates
        self.groups = [[buffer] for buffer in self.candidates]  # after the first step: only these, by dtype
        self.tensors: list[list[Tensor]] = []  # of ``groups``, before the step
        self.first: list[Tensor] = []  # their values, flat, one tensor per group
        self.versions: list[tuple[Tensor, int]] = []  # of the candidates, before the step
        self.first_changes: dict[int, dict[int, Tensor]] = {}  # of the first step, by row and candidate
        self.sums = torch.zeros(0)  # (rows, elements)
        self.in_step = False

    def begin(self) -> None:
        """Start a step. No host sync."""
        if not self.candidates:
            return
        self._snapshot()
        self.versions = [(tensor, tensor._version) for tensor in (buffer.tensor for buffer in self.candidates)]
        self.sums.zero_()
        # A captured step has written nothing yet; ``training/cuda_graph.py`` puts replaced tensors back.
        self.in_step = not (self.sums.is_cuda and torch.cuda.is_current_stream_capturing())

    def add(self, row: int, samples: int) -> None:
        """Remember and undo the changes of a micro-batch. No host sync.

        Raise UserError for a buffer that did not change in the first step.
        """
        if not self.candidates:
            return
        changed = {i for i in range(len(self.candidates)) if i not in self.found and self._has_changed(i)}
        if not self.complete:
            self.found |= changed
            changes = self.first_changes.setdefault(row, {})
            for i in self.found:
                change = self._change(i) * samples
                changes[i] = changes[i] + change if i in changes else change
        elif changed:
            raise UserError(
                f"buffer {self.candidates[min(changed)].name}: changes now, but did not in the first step: its changes "
                "are not averaged over ranks; write to it in each forward pass, or register it with persistent=False"
            )
        elif self.groups:
            self.sums[row].add_(torch.cat([self._change(i) for i in range(len(self.groups))]) * samples)
        self._undo()

    def copies(self) -> BufferCopies:
        """Copy the buffers that may change."""
        return BufferCopies([self.candidates[i] for i in sorted(self.found)] if self.complete else self.candidates)

    @contextmanager
    def exchanged(self, copies: BufferCopies) -> Iterator[None]:
        """Let the model use ``copies`` within a ``with`` block."""
        versions = self.versions
        if not self.complete:
            self.versions = copies.versions
        copies.swap()
        try:
            yield
        finally:
            copies.swap()
            self.versions = versions

    def reduce(self, global_size: int) -> Tensor | None:
        """Return the average change, float64 (elements,), or None if no buffer changes. A collective.

        No host sync, except in the first step.
        """
        self.in_step = False
        if not self.candidates:
            return None
        if not self.complete:
            self._agree_on_groups()
        if not self.groups:
            return None
        self.all_reduce(self.sums)
        return self.sums.sum(0) / global_size

    def apply(self, change: Tensor, skip: Tensor | None = None) -> None:
        """Apply what ``reduce`` returned, unless ``skip``, a scalar, is positive. No host sync."""
        if skip is not None:
            change = torch.where(skip > 0, 0.0, change)
        for group, part in enumerate(change.split([first.numel() for first in self.first])):
            first = self.first[group]
            values = first.double() + part
            self._write(group, (values if first.is_floating_point() else values.round()).to(first.dtype))

    def reset(self) -> None:
        """Undo the changes of a step that an exception ended."""
        if self.in_step:
            self._undo()
        self.in_step = False

    def _agree_on_groups(self) -> None:
        """Find, with all ranks, the buffers that changed in the first step. A collective, then a host sync."""
        device = self.first[0].device
        counts = torch.zeros(len(self.candidates), dtype=torch.float64)
        counts[list(self.found)] = 1.0
        counts = counts.to(device)
        self.all_reduce(counts)
        self.found = {i for i, count in enumerate(counts.tolist()) if count}  # host sync
        order = sorted(self.found, key=lambda i: (str(self.first[i].dtype), i))
        sizes = [self.first[i].numel() for i in order]
        self.sums = torch.zeros(self.rows, sum(sizes), dtype=torch.float64, device=device)
        for row, changes in self.first_changes.items():
            for i, target in zip(order, self.sums[row].split(sizes), strict=True):
                if i in changes:
                    target.copy_(changes[i])
        ordered = [self.candidates[i] for i in order]
        self.groups = [list(group) for _, group in groupby(ordered, lambda buffer: buffer.tensor.dtype)]
        self.first_changes, self.complete = {}, True
        self._snapshot()  # all changes of this step are undone

    def _snapshot(self) -> None:
        self.tensors = [[buffer.tensor for buffer in group] for group in self.groups]
        self.first = [_flat(tensors) for tensors in self.tensors]

    def _has_changed(self, candidate: int) -> bool:
        buffer, (tensor, version) = self.candidates[candidate], self.versions[candidate]
        return buffer.is_statistic or buffer.tensor is not tensor or tensor._version != version

    def _change(self, group: int) -> Tensor:
        """Return the difference of a group from before the step, float64; an unchanged infinity differs by 0."""
        before, after = self.first[group], _flat([buffer.tensor for buffer in self.groups[group]])
        return torch.where(after == before, 0.0, after.double() - before.double())

    def _undo(self) -> None:
        """Return to the buffers that the step began with."""
        for group in range(len(self.groups)) if self.complete else self.found:
            self._write(group, self.first[group])

    def _write(self, group: int, values: Tensor) -> None:
        """Write to the original tensors of a group, and put these back if they were replaced."""
        tensors = self.tensors[group]
        parts = values.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
        for buffer, tensor in zip(self.groups[group], tensors, strict=True):
            buffer.module._buffers[buffer.key] = tensor


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
