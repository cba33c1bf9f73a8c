"""The random numbers of samples: functions of a key, not of the state of a generator."""

import hashlib
from dataclasses import dataclass, replace

from torch import Tensor

from distlenet.utils.keyed_random import hash32


@dataclass(frozen=True)
class SampleKeys:
    """The only source of randomness for a transform: a function of seed, epoch and sample index.

    What happens to a sample does not depend on ranks, workers, restarts or its neighbors in the batch.
    """

    seed: int
    epoch: int | Tensor  # an int64 scalar tensor if the step is captured in a CUDA graph
    indices: Tensor  # int64 (n,), on the rank's device
    stream: int | None = None  # 32 bits; what ``split`` adds to the key

    def bits(self) -> Tensor:
        """Return 32 random bits per sample: int64 (n,)."""
        words = (self.seed, self.epoch) if self.stream is None else (self.seed, self.epoch, self.stream)
        return hash32(self.indices, *words)

    def split(self, name: str | int) -> "SampleKeys":
        """Return keys whose random numbers are independent of those of these keys and of other names."""
        digest = hashlib.sha256(f"{self.stream} {name!r}".encode()).digest()
        return replace(self, stream=int.from_bytes(digest[:4], "little"))
