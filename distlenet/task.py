"""The interface between a user's task and the engine, which supplies order, distribution and exactness."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, device, nn

from distlenet.utils.keyed_random import hash32

Data = Any
"""The samples of a batch: tensors whose first dimension is the sample, nested in tuples and dicts.

A list holds one item per sample: that is how ragged parts are written.
"""


@dataclass(frozen=True)
class SampleKeys:
    """The only source of randomness for a transform: a function of seed, epoch and sample index.

    What happens to a sample does not depend on ranks, workers, restarts or its neighbours in the batch.
    """

    seed: int
    epoch: int | Tensor  # an int64 scalar tensor if the step is captured in a CUDA graph
    indices: Tensor  # int64 (n,), on the rank's device

    def bits(self) -> Tensor:
        """Return 32 random bits per sample: int64 (n,)."""
        return hash32(self.indices, self.seed, self.epoch)


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    data: Data
    indices: Tensor  # int64 (n,), on the host: the samples' indices in the dataset
    keys: SampleKeys | None  # None in evaluation
    epoch: int  # from 0
    number: int  # of the global batch in the epoch, from 0
    global_size: int  # samples of the global batch, over all ranks

    def __len__(self) -> int:
        """Return n, the samples of this rank."""
        return len(self.indices)


class MapDataset(Protocol):
    """A map-style dataset that serves whole batches, as torch's optional ``__getitems__`` does."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitems__(self, indices: Tensor) -> Data:
        """Return the samples at ``indices``, int64 (n,)."""


@dataclass(frozen=True)
class Datasets:
    """The datasets of a task."""

    train: MapDataset
    test: MapDataset
    source: str  # the origin of the samples, for messages


class ErrorAnalysis(Protocol):
    """A report on the test samples, in addition to the metrics."""

    def update(self, outputs: Any, data: Data, indices: Tensor) -> None:
        """Add the outputs for one batch. No host sync."""

    def report(self) -> dict[str, Any]:
        """Return the result over all ranks, as JSON values. A collective, then a host sync."""


class Task(Protocol):
    """A network, its data, its loss and its metrics.

    ``loss`` and ``metrics`` return one value per sample. Therefore the engine can weight samples equally over ranks,
    micro-batches and short batches, sum exactly, and list the worst samples of a failed step.
    """

    metric_names: Sequence[str]  # the keys of ``metrics``, in order
    eval_batch_size: int  # samples evaluated together; fixed, so that results do not depend on the number of ranks

    def model(self) -> nn.Module:
        """Return a new network, initialised from torch's global generator."""

    def datasets(self) -> Datasets:
        """Return the datasets."""

    def transform(self, data: Data, keys: SampleKeys | None) -> Data:
        """Turn samples of a dataset, on the rank's device, into input for ``loss``; ``keys`` is None in evaluation."""

    def loss(self, model: nn.Module, data: Data) -> tuple[Tensor, Any]:
        """Return the losses of transformed samples, float (n,), and the model's outputs.

        The loss may differ in training and in evaluation mode, as dropout does: ``model.training``.
        """

    def metrics(self, outputs: Any, data: Data) -> dict[str, Tensor]:
        """Return values per sample, (n,), by name; the engine averages them."""

    def error_analysis(self, device: device) -> ErrorAnalysis | None:
        """Return an empty analysis for the final evaluation, or None."""

    def state_dict(self) -> dict[str, Any]:
        """Return what prediction needs besides the weights: tensors and plain values."""
