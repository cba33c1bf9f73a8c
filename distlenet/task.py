"""The interface between a user's task and the engine, which supplies order, distribution and exactness."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

from torch import Tensor, device, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from distlenet.config.schema import Config
from distlenet.utils.errors import UserError
from distlenet.utils.sample_keys import SampleKeys as SampleKeys

Data = Any
"""The samples of a batch: tensors whose first dimension is the sample, nested in tuples and dicts.

A list holds one item per sample: that is how ragged parts are written.
"""


Losses = Tensor | tuple[Tensor, Tensor]
"""Losses of n samples, float (n,), or a pair of losses and weights."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch."""

    data: Data
    indices: Tensor  # int64 (n,), on the host: the samples' indices in the dataset
    keys: SampleKeys | None  # None in evaluation
    epoch: int  # from 0
    number: int  # of the global batch in the epoch, from 0
    global_size: int  # samples of the global batch, over all ranks
    transformed: bool = False  # ``data`` is what ``Task.transform`` returned

    def __len__(self) -> int:
        """Return n, the samples of this rank."""
        return self.indices.numel()

    def inputs(self, task: "Task") -> Data:
        """Return the input of the task's loss; ``()`` without samples, which no user's code receives."""
        if not len(self):
            return ()
        return self.data if self.transformed else task.transform(self.data, self.keys)


class MapDataset(Protocol):
    """Any map-style dataset, as ``torch.utils.data.DataLoader`` takes it.

    Before each sample is loaded, the global generators of ``torch``, ``random`` and ``numpy`` are seeded by (seed,
    epoch, index), in the evaluation by (seed, index): random transforms in ``__getitem__`` do not depend on ranks,
    workers or restarts. A generator that the dataset itself holds is not seeded, and must not be used.
    """

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""


class BatchDataset(Protocol):
    """A dataset that serves whole batches: for data in memory, which one indexing operation can select.

    ``get_batch`` must not be random: the generators are not seeded for it, and a batch consists of other samples on
    another number of ranks. Use the keys in ``Task.transform``.
    """

    def __len__(self) -> int:
        """Return the number of samples."""

    def get_batch(self, indices: Tensor) -> Data:
        """Return the samples at ``indices``, int64 (n,), n > 0."""


@dataclass(frozen=True)
class Datasets:
    """The datasets of a task."""

    train: MapDataset | BatchDataset
    test: MapDataset | BatchDataset
    _: KW_ONLY  # a third dataset without a name could be meant as either set for evaluation
    source: str = ""  # the origin of the samples, for messages
    validation: MapDataset | BatchDataset | None = None
    classes: Sequence[str] | None = None  # the names of the labels 0, 1, ...
    fingerprint: Mapping[str, str] | None = None  # digests that differ if the data does: of each split, by its name


class ErrorAnalysis(Protocol):
    """A report on the test samples, in addition to the metrics."""

    def update(self, outputs: Any, data: Data, indices: Tensor) -> None:
        """Add the outputs for one batch. No host sync."""

    def report(self) -> dict[str, Any]:
        """Return the result over all ranks, as JSON values. A collective, then a host sync."""


class Task(ABC):
    """A network, its data, its loss and its metrics: what a user supplies.

    ``task.name=my_package.tasks:Spam task.args.max_words=200`` creates ``Spam(config, max_words=200)``.

    The order of calls: ``__init__``, then ``datasets`` and ``model``, or ``load_state_dict`` and ``model`` for a
    prediction. For each batch ``collate``, unless the dataset has ``get_batch``, then ``transform``; for each
    micro-batch ``loss`` and ``metrics``. After an evaluation ``summary_metrics``, and for a checkpoint ``state_dict``.

    ``loss`` and ``metrics`` return one value per sample. Therefore the engine can weight samples equally over ranks,
    micro-batches and short batches, sum exactly, and list the worst samples of a failed step. A batch has at least one
    sample.
    """

    eval_batch_size: int = 250
    """Samples that are evaluated together; fixed, so that results do not depend on the number of ranks."""

    partners: bool = False
    """Whether each training sample is loaded together with a random partner, for augmentations that mix two samples.

    ``transform`` then gets the pair (samples, partners) as data in training. The partner is any sample of the training
    set, drawn by the sample's key: a sample of the same batch would depend on the number of ranks.
    """

    random_transform: bool = True
    """Whether ``transform`` needs the keys. If not, a data set on the GPU is transformed once, with ``keys=None``."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new network on the CPU, initialised from torch's global generator.

        It is trained in training mode, whatever mode it has; its own ``train`` may keep layers in evaluation mode.
        """

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: ``params`` and, if they differ, settings such as ``lr``.

        Each trainable parameter belongs to one group. The schedule multiplies the ``lr`` of each group. By default,
        all are one group; with ``optim.no_decay``, biases and norms are a second one without weight decay.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.config.optim.no_decay:
            return [{"params": parameters}]
        return [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1]},
            {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
        ]

    @abstractmethod
    def datasets(self) -> Datasets:
        """Return the datasets."""

    @abstractmethod
    def loss(self, model: nn.Module, data: Data) -> tuple[Losses, Any]:
        """Return the losses of transformed samples, float (n,), and the model's outputs.

        Or return ``(losses, weights), outputs``, with non-negative weights, float (n,): then the loss of a global batch
        is the sum of weight × loss over the sum of the weights, over all ranks and micro-batches. Only the ratios of
        weights matter. They are rounded to multiples of 2**-20, and no gradient flows into them.
        The loss may differ in training and in evaluation mode, as dropout does: ``model.training``.
        """

    def collate(self, samples: list[Any]) -> Data:
        """Combine samples of a map-style dataset. By default as torch's DataLoader, but without its lists of tensors.

        ``samples`` are a rank's share of a global batch, which is split into micro-batches later. Therefore the result
        for a sample must not depend on the others: instead of padding to the longest, return a list of tensors and pad
        in ``loss``, or pad to a fixed length. It may run in a loader process, and must not be random.
        The default raises UserError for samples of different shapes.
        """
        try:
            return _lists_to_tuples(default_collate(samples))
        except RuntimeError as error:
            # "each tensor to be equal size", "each element in list"; in a worker also "resize storage", torch's buffer
            if "equal size" not in str(error) and "resize storage" not in str(error):
                raise
            name = type(self).__name__
            raise UserError(
                f"{name}.collate: samples have different shapes{_different_shapes(samples)}, which the default cannot "
                f"combine; define {name}.collate, which returns a list of tensors; see docs/own.md"
            ) from error

    def transform(self, data: Data, keys: SampleKeys | None) -> Data:
        """Turn samples of a dataset, on the rank's device, into input for ``loss``; ``keys`` is None in evaluation."""
        return data

    def metrics(self, outputs: Any, data: Data) -> dict[str, Tensor]:
        """Return values per sample, (n,), by name; the engine averages them exactly."""
        return {}

    def prediction(self, outputs: Any, data: Data) -> dict[str, Any] | None:
        """Return what ``summary_metrics`` needs of each sample: tensors (n, ...) or lists of n items, by name.

        They are kept in host memory until the end of an evaluation: each rank holds those of its samples, and rank 0
        then about three times those of the whole set, while it gathers them. By default None: nothing is kept.
        """
        return None

    def summary_metrics(self, predictions: dict[str, Any]) -> dict[str, float]:
        """Return metrics that are not averages over samples, such as AUC, by name.

        ``predictions`` holds what ``prediction`` returned for all samples of a set, in the order of the dataset, on
        the CPU: the same on any number of ranks. Rank 0 calls this after each evaluation, and the others wait for at
        most ``distributed.step_timeout_s``.
        """
        return {}

    def predict(self, model: nn.Module, data: Data) -> Any:
        """Return the model's outputs for raw samples, as the dataset holds them; ``distlenet.load_model`` calls it.

        A method that replaces it must call ``transform(data, None)``, or do what that does. By default it also computes
        the loss, so ``data`` must include targets.
        """
        return self.loss(model, self.transform(data, None))[1]

    def export_inputs(self, data: Data) -> Tensor | dict[str, Tensor]:
        """Return what an exported network takes, and so ``predict``, of the collated samples ``data`` of a dataset.

        One tensor or tensors by name, with the samples first. By default the first part of a pair (inputs, targets).
        Ragged parts are padded here. Raise UserError if the data is not such a pair.
        """
        match data:
            case (Tensor() as inputs, _):
                return inputs
        name = type(self).__name__
        raise UserError(
            f"{name}.export_inputs: the samples are not a pair of a tensor and targets; define {name}.export_inputs, "
            "which returns the tensors that predict takes; see docs/own.md"
        )

    def postprocess(self, outputs: Any) -> Any:
        """Return what is served and shown of the outputs of ``predict``, such as probabilities, (n, ...)."""
        return outputs

    def error_analysis(self, device: device) -> ErrorAnalysis | None:
        """Return an empty analysis for the final evaluation, or None.

        Its report is written to RUN/test.json. report.html shows one of the form ``{"images": [{"caption": TEXT, "png":
        BASE64}, ...]}``, and that of ``ImageClassification``.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what prediction needs besides the weights: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, before the model is used for an evaluation or a prediction."""


def new_model(task: Task) -> nn.Module:
    """Return what ``task.model`` returns. Raise UserError if it is no network."""
    model = task.model()
    if not isinstance(model, nn.Module):
        raise _wrong_type(task, "model", model, "a torch.nn.Module")
    return model


def datasets_of(task: Task) -> Datasets:
    """Return what ``task.datasets`` returns. Raise UserError if it is of another type. A collective."""
    datasets = task.datasets()
    if not isinstance(datasets, Datasets):
        raise _wrong_type(task, "datasets", datasets, "distlenet.Datasets")
    return datasets


def _wrong_type(task: Task, hook: str, value: object, expected: str) -> UserError:
    return UserError(f"{type(task).__name__}.{hook}: returned a {type(value).__name__}; expected {expected}")


def _different_shapes(samples: list[Any]) -> str:
    """Return two shapes of the same part of two samples, for a message."""
    first, *others = ([list(getattr(part, "shape", ())) for part in tree_leaves(sample)] for sample in samples)
    for other in others:
        for expected, shape in zip(first, other, strict=False):
            if shape != expected:
                return f", such as {min(shape, expected)} and {max(shape, expected)}"
    return ""


def _lists_to_tuples(data: Any) -> Any:
    """Return ``data`` with a tuple for each list of parts: torch combines pairs into a list of two tensors.

    A list of strings holds one item per sample.
    """
    if isinstance(data, dict):
        return {key: _lists_to_tuples(item) for key, item in data.items()}
    if isinstance(data, list | tuple):
        if all(isinstance(item, str | bytes) for item in data):
            return list(data)
        items = map(_lists_to_tuples, data)
        return type(data)(*items) if hasattr(data, "_fields") else tuple(items)
    return data
