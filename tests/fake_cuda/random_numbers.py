"""Random numbers as on a GPU: a function of the seed and the offset of the CUDA generator.

An operator takes some numbers of the generator's sequence, and moves its offset by them. In a capture, the generator
has no position yet: it has one at each launch of the graph, to which the offset within the graph is added.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fake_cuda.host_memory import flat

Position = tuple[int, int]  # seed, offset
_increments: dict[Any, int] = {}  # by operator and shapes: how far it moves the offset
USUAL_INCREMENT = 4


def generator_of(device: int, kwargs: Any) -> Any:
    """Return the generator that an operator uses."""
    return kwargs.get("generator") or torch.cuda.default_generators[device]


def position(generator: Any) -> Position:
    """Return where the generator is, outside of a capture."""
    return generator.initial_seed(), generator.get_offset()


def _key(func: Any, args: Any) -> Any:
    return func, tuple((tensor.shape, tensor.dtype) for tensor in flat(args)), str(args) if not flat(args) else ""


def learn(func: Any, args: Any, generator: Any, before: Position) -> None:
    """Note how far the operator moved the offset. In a capture PyTorch does not reveal it."""
    _increments[_key(func, args)] = generator.get_offset() - before[1]


@contextmanager
def seeded(at: Position | None) -> Iterator[None]:
    """Let the CPU's generator begin at a place that is a function of ``at``; restore it after the block."""
    if at is None:
        yield
        return
    cpu = torch.default_generator
    state = cpu.get_state()
    cpu.manual_seed(hash(at) & (1 << 63) - 1)
    try:
        yield
    finally:
        cpu.set_state(state)


@dataclass
class Offsets:
    """The random operators of a capture: the state of the generator that each used, and how far it moves the offset."""

    operators: list[tuple[Any, int]] = field(default_factory=list)

    def at_replay(self, work: Callable[[], Any], func: Any, args: Any, generator: Any) -> Callable[[], Any]:
        """Return the work of an operator of a capture, with the random numbers of a replay."""
        number = len(self.operators)
        state = generator.graphsafe_get_state()  # a program may give the generator another one for the next operator
        self.operators.append((state, _increments.get(_key(func, args), USUAL_INCREMENT)))

        def replay() -> Any:
            seed, end = position(state)  # PyTorch has already moved the offset by that of the whole graph
            same = [i for i, (other, _) in enumerate(self.operators) if position(other) == (seed, end)]
            left = sum(self.operators[i][1] for i in same if i >= number)
            with seeded((seed, end - left)):
                return work()

        return replay
