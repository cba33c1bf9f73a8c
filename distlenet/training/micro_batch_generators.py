"""The random numbers of a captured step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from distlenet.training.device_step import Seed
from distlenet.utils.keyed_random import default_generator, seed_micro_batch


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
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[Seed]:
        """Yield a function that selects the generator of a micro-batch, while ``graph`` is captured."""
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
