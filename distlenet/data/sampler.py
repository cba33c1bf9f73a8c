"""Which samples a rank takes, and when: a function of seed, epoch, global batch and rank alone."""

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from distlenet.data.permutation import Permutation
from distlenet.data.sources import ImageDataset
from distlenet.utils.errors import UserError

AT_ONCE = 4096
"""Indices that a rank computes together: some milliseconds' work, in a few dozen calls."""


class GlobalBatchSampler(DistributedSampler[Tensor]):
    """Give a rank its share of every global batch, as one tensor of indices per optimizer step.

    Position p of an epoch's permutation belongs to global batch p // B and, as in ``DistributedSampler``,
    to rank p % W. So global batch t is positions tB to (t+1)B-1 for every world size W, and nothing is
    padded: the last batch of an epoch is as short as what is left, or is left out (``drop_last``).
    With V virtual shards, p belongs to shard p % V, and that to rank p % V % W: the same, where W divides V.

    Yields int64 tensors (n,), where n = B/W where W divides B, but for the last batch, in which ranks may
    differ and may get nothing (n = 0). All ranks yield equally often.
    """

    def __init__(
        self,
        data: ImageDataset,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        drop_last: bool = False,
        shards: int | None = None,
    ) -> None:
        """Order ``data`` for this rank; ``shards`` divides B. Raises UserError where an epoch would have no step."""
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.samples = len(data)
        self.global_batch = global_batch
        self.steps = self.samples // global_batch if drop_last else -(-self.samples // global_batch)
        self.start, self.stop = 0, self.steps
        place = torch.arange(min(global_batch, self.samples))
        self.mine = ((place % (shards or global_batch)) % world_size == rank).nonzero().squeeze(1)  # int64 (B/W,)
        self.steps_at_once = max(1, AT_ONCE // max(1, len(self.mine)))
        if self.steps == 0:
            raise UserError(
                f"data.drop_last=true: drops all {self.samples} images of the training set, which do not fill "
                f"train.global_batch_size={global_batch}; give a smaller one, or data.drop_last=false"
            )

    def set_position(self, epoch: int, start: int, most: int | None = None) -> None:
        """Choose the epoch, how many of its global batches are already done, and how many at most are to come."""
        self.set_epoch(epoch)
        self.start = start
        self.stop = self.steps if most is None else min(self.steps, start + most)

    def count(self, step: int) -> int:
        """Return how many samples global batch ``step`` of an epoch holds, over all ranks."""
        return min(self.global_batch, self.samples - step * self.global_batch)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield this rank's indices of each global batch, from ``start`` to before ``stop``."""
        order = permutation(self.samples, self.seed, self.epoch)
        for first in range(self.start, self.stop, self.steps_at_once):
            starts = torch.arange(first, min(first + self.steps_at_once, self.stop)) * self.global_batch
            places = starts[:, None] + self.mine  # (steps, B/W)
            lengths = (places < self.samples).sum(1).tolist()
            yield from order(places[places < self.samples]).split(lengths)

    def __len__(self) -> int:
        """Return how many global batches are left."""
        return self.stop - self.start


class ShardSampler:
    """Split a set over ranks for evaluation: every sample once, no padding, the last chunk short.

    Chunk k, of ``chunk`` neighbouring samples, belongs to rank k % W. So which samples are computed
    together does not depend on W. Yields int64 tensors (n,), n <= ``chunk``.
    """

    def __init__(self, samples: int, chunk: int, rank: int, world_size: int) -> None:
        """Choose the chunks of ``rank``."""
        self.samples, self.chunk = samples, chunk
        self.starts = range(rank * chunk, samples, world_size * chunk)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the indices of each of this rank's chunks."""
        for start in self.starts:
            yield torch.arange(start, min(start + self.chunk, self.samples))

    def __len__(self) -> int:
        """Return how many chunks this rank has; it may be none."""
        return len(self.starts)


def permutation(samples: int, seed: int, epoch: int) -> Permutation:
    """Shuffle 0 to ``samples``-1 for an epoch.

    Seed and epoch are hashed together: with their sum, as in ``DistributedSampler``, epoch 1 of seed 0
    would be epoch 0 of seed 1.
    """
    digest = hashlib.sha256(f"order of seed {seed} in epoch {epoch}".encode()).digest()
    return Permutation(samples, struct.unpack("<8I", digest))
