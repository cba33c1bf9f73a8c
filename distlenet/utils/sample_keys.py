"""The random numbers of samples: functions of a key, not of the state of a generator."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from distlenet.utils.keyed_random import hash32, mix32
from distlenet.utils.normal_quantile import normal_quantile


@dataclass(frozen=True)
class SampleKeys:
    """The only source of randomness for a transform: a function of seed, epoch and sample index.

    What happens to a sample does not depend on ranks, workers, restarts or its neighbors in the batch.

    ``uniform``, ``normal``, ``integers``, ``choice`` and ``bernoulli`` return numbers of shape (n, *shape) on the
    device of the samples, without a host sync; a CUDA graph can capture them. Each takes a name for its purpose:
    other names and other methods give independent numbers, and the same call gives the same numbers again. An element
    does not depend on ``shape`` as long as its position in the flattened shape is the same.

        noise = keys.normal("noise", images.shape[1:], std=0.1)
        flip = keys.bernoulli("flip", 0.5)  # bool (n,)

    In an evaluation a task gets None in place of keys: it leaves the augmentation out, or uses the mean of the noise.
    """

    seed: int
    epoch: int | Tensor  # an int64 scalar tensor in a captured CUDA graph
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

    def uniform(self, name: str, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return float32 numbers from [low, high), in 2**24 steps; rounding may give ``high`` if it is not 1."""
        steps = (self._words("uniform", name, shape) >> 8).double()
        return steps.mul_(2.0**-24).mul_(high - low).add_(low).float()

    def normal(self, name: str, shape: Sequence[int] = (), mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return normally distributed float32 numbers, within 6.34 standard deviations; see ``normal_quantile``."""
        return normal_quantile(self._words("normal", name, shape)).mul_(std).add_(mean)

    def integers(self, name: str, high: int, shape: Sequence[int] = (), low: int = 0) -> Tensor:
        """Return int64 numbers from low to high - 1, equally likely to within 2**-32 relatively."""
        span = high - low
        if not 1 <= span <= 2**31:
            raise ValueError(f"keys.integers: high={high}, low={low}: expected 1 to 2**31 possible values")
        first, second = self._words("integers", name, (*shape, 2)).unbind(-1)
        return ((first * span + ((second * span) >> 32)) >> 32) + low  # the product with 64 bits

    def choice(
        self,
        name: str,
        options: Sequence[float],
        shape: Sequence[int] = (),
        probabilities: Sequence[float] | None = None,
    ) -> Tensor:
        """Return numbers from ``options``, int64 if all are int, else float32; by default equally likely.

        The probabilities are rounded to multiples of 2**-32. To choose from a tensor, index it by ``integers``.
        """
        shares = [1 / max(len(options), 1)] * len(options) if probabilities is None else probabilities
        limits = [0, *(round(limit * 2**32) for limit in accumulate(shares))]
        if not options or len(shares) != len(options) or min(shares) < 0 or abs(limits[-1] - 2**32) > 2**12:
            raise ValueError(
                f"keys.choice: options={options}, probabilities={probabilities}: expected options, and as many "
                "probabilities, which are not negative and have the sum 1"
            )
        words = self._words("choice", name, shape)
        dtype = torch.int64 if all(isinstance(option, int) for option in options) else torch.float32
        chosen = torch.full_like(words, options[-1], dtype=dtype)
        for option, limit in reversed(list(zip(options[:-1], limits[1:-1], strict=True))):
            chosen = chosen.masked_fill_(words < limit, option)  # scalars: a list would have to be copied to the device
        return chosen

    def bernoulli(self, name: str, p: float, shape: Sequence[int] = ()) -> Tensor:
        """Return bool values that are true with probability ``p``, rounded to a multiple of 2**-32."""
        if not 0 <= p <= 1:
            raise ValueError(f"keys.bernoulli: p={p}: expected a probability")
        return self._words("bernoulli", name, shape) < round(p * 2**32)

    def _words(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """Return 32 random bits per sample and element: int64 (n, *shape).

        Two hashes of the sample, 64 bits, and the element are hashed: with 32 bits, samples with equal hashes would
        not be rare.
        """
        if not isinstance(name, str):
            raise TypeError(f"keys.{kind}: the first argument is a name for the purpose, such as 'noise', not {name!r}")
        digest = hashlib.sha256(f"{self.stream} {kind} {name!r}".encode()).digest()
        first, second = (int.from_bytes(digest[k : k + 4], "little") for k in (0, 4))
        outer = hash32(self.indices, self.seed, self.epoch, first).unsqueeze(1)
        inner = hash32(self.indices, second, self.epoch, self.seed).unsqueeze(1)
        elements = mix32(torch.arange(1, prod(shape) + 1, device=self.indices.device))
        return mix32(mix32(outer ^ elements) ^ inner).view(len(self.indices), *shape)
