"""The samples of each rank and step: a pure function of seed, epoch, global batch and rank."""

import hashlib
import struct
from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from distlenet.data.permutation import Permutation
from distlenet.utils.errors import UserError

INDICES_AT_ONCE = 2**16  # computed in one vectorised call: two milliseconds of work


class GlobalBatchSampler(DistributedSampler[Tensor]):
    """Give a rank its share of every global batch, as one tensor of indices per optimizer step.

    Position p of an epoch's permutation belongs to global batch p // B and, as in ``DistributedSampler``, to rank
    p % W. Global batch t therefore consists of positions tB to (t+1)B-1 for every world size W, without padding: the
    last batch of an epoch is shorter, or is dropped (``drop_last``). With V virtual shards, p belongs to shard p % V,
    and the shard to rank p % V % W, which is the same if W divides V.

    Index tensors are int64 (n,), with n = B/W if W divides B; n may be 0 in the last batch, so that all ranks have
    equally many batches.
    """

    def __init__(
        self,
        dataset: Sized,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        drop_last: bool,
        virtual_shards: int | None,
    ) -> None:
        """Order ``dataset`` for this rank; ``virtual_shards`` divides B. Raise UserError if an epoch has no step."""
        super().__init__(cast(Dataset[Any], dataset), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.samples, self.global_batch_size = len(dataset), global_batch_size
        self.steps = self.samples // global_batch_size if drop_last else -(-self.samples // global_batch_size)
        offsets = torch.arange(min(global_batch_size, self.samples))
        shards = offsets % (virtual_shards or global_batch_size)
        self.rank_offsets = (shards % world_size == rank).nonzero().squeeze(1)  # int64 (B/W,)
        if self.steps == 0:
            raise UserError(
                f"data.drop_last=true: drops all {self.samples} images of the training set, which do not fill "
                f"train.global_batch_size={global_batch_size}; give a smaller one, or data.drop_last=false"
            )

    def global_size(self, number: int) -> int:
        """Return how many samples global batch ``number`` of an epoch has, over all ranks."""
        return min(self.global_batch_size, self.samples - number * self.global_batch_size)

    def batches(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield this rank's indices of the global batches ``start`` to ``stop`` - 1 of an epoch."""
        order = permutation(self.samples, self.seed, epoch)
        stop = self.steps if stop is None else min(stop, self.steps)
        at_once = max(1, INDICES_AT_ONCE // max(1, len(self.rank_offsets)))
        for first in range(start, stop, at_once):
            starts = torch.arange(first, min(first + at_once, stop)) * self.global_batch_size
            positions = starts[:, None] + self.rank_offsets  # (batches, B/W)
            lengths = (positions < self.samples).sum(1).tolist()
            yield from order(positions[positions < self.samples]).split(lengths)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the batches of the epoch chosen by ``set_epoch``, as ``DistributedSampler`` does."""
        return self.batches(self.epoch)

    def __len__(self) -> int:
        """Return the number of global batches of an epoch."""
        return self.steps


def permutation(samples: int, seed: int, epoch: int) -> Permutation:
    """Shuffle 0 to ``samples`` - 1 for an epoch."""
    # Hashed together: with their sum, as in DistributedSampler, epoch 1 of seed 0 would equal epoch 0 of seed 1.
    digest = hashlib.sha256(f"order of seed {seed} in epoch {epoch}".encode()).digest()
    return Permutation(samples, struct.unpack("<8I", digest))
