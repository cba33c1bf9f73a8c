"""The micro-batches of a rank's share of a global batch."""

from collections.abc import Callable

from distlenet.reduction.reducer import MicroBatch, T
from distlenet.task import Data
from distlenet.utils.nested import count_samples, select_samples


class ConsecutiveMicroBatches:
    """Splits a rank's share into runs of consecutive samples: a part of the ``Reducer`` protocol."""

    def __init__(self, rank: int, micro_batches_per_rank: int, micro_batch_size: int) -> None:
        self.rank, self.micro_batch_size, self.micro_batches_per_rank = rank, micro_batch_size, micro_batches_per_rank

    def cap_micro_batch_size(self, limit: int) -> None:
        """Use micro-batches of at most ``limit`` samples."""
        share = self.micro_batch_size * self.micro_batches_per_rank
        if limit < self.micro_batch_size:
            self.micro_batch_size, self.micro_batches_per_rank = limit, -(-share // limit)

    def split(self, data: Data) -> list[MicroBatch]:
        """Return the micro-batches of a rank's share, none of them empty."""
        samples, size = count_samples(data), self.micro_batch_size
        starts = range(0, samples, size)
        first = self.rank * self.micro_batches_per_rank
        return [MicroBatch(first + k, select_samples(data, slice(s, s + size))) for k, s in enumerate(starts)]

    def map(self, function: Callable[[MicroBatch], T], micro_batches: list[MicroBatch]) -> list[T]:
        """Call ``function`` on each micro-batch."""
        return [function(micro_batch) for micro_batch in micro_batches]
