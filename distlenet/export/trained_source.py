"""What is exported: the network of a checkpoint, and the data of its run."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlenet.checkpoint.format import State, evaluation_weights, load_checkpoint, load_task_state
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.data.batched_dataset import AnyDataset, read_samples
from distlenet.data.sources import require_local_data
from distlenet.distributed.context import init_distributed, set_threads
from distlenet.export.version_directory import sha256_of
from distlenet.inference.trained_model import TrainedModel, restore_model
from distlenet.task import Data, Datasets, Task, datasets_of
from distlenet.tasks.registry import make_task, reads_images
from distlenet.utils.errors import UserError
from distlenet.utils.urls import is_url, join_url


@dataclass(frozen=True)
class TrainedSource:
    """A checkpoint with one of its weights, and its network."""

    given: str
    file: Path
    sha256: str
    state: State
    weights: str  # ema, best or last
    trained: TrainedModel
    overrides: Sequence[str]
    files: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the run, or of the file, as a part of a URL."""
        path = Path(self.given.rstrip("/"))
        path = path.parent if path.suffix == ".pt" and path.parent.name == "checkpoints" else path
        path = path.parent if path.name == "checkpoints" else path
        path = path if path.name else self.file.parent.parent
        return re.sub(r"[^A-Za-z0-9._-]+", "-", path.name.removesuffix(".pt")).strip(".-") or "model"


def load_source(checkpoint: str, weights: str | None, overrides: Sequence[str], files: Sequence[str]) -> TrainedSource:
    """Load the network of a run, a checkpoint file or a URL of one.

    ``weights`` are ``best``, those of best.pt; ``ema``, the average of the last checkpoint; ``last``, those of the last
    checkpoint without an average; None: as ``predict``, the average if there is one. Raise UserError.
    """
    set_threads(None)
    file = find_checkpoint(_best_of(checkpoint) if weights == "best" else checkpoint)
    state = load_checkpoint(file)
    if weights == "ema" and "ema" not in state:
        raise UserError(f"--weights ema: checkpoint {file} has no average, see train.ema_decay; give --weights last")
    chosen = state if weights == "last" else evaluation_weights(state)
    kind = weights or ("ema" if "ema" in state else "last")
    trained = restore_model(chosen, file, None, overrides, files)
    return TrainedSource(checkpoint, file, sha256_of(file), chosen, kind, trained, overrides, files)


def _best_of(checkpoint: str) -> str:
    path = Path(checkpoint)
    if is_url(checkpoint) and (path.name == "best.pt" or path.suffix != ".pt"):
        names = {"best.pt": [], "checkpoints": ["best.pt"]}.get(path.name, ["checkpoints", "best.pt"])
        return join_url(checkpoint, *names)
    candidates = [path] if path.name == "best.pt" else [path / "checkpoints/best.pt", path / "best.pt"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"--weights best: {checkpoint} has no checkpoints/best.pt, see checkpoint.best_by; give --weights last"
        )
    return str(found)


class RunData:
    """The data sets of the run, loaded as an evaluation loads them."""

    def __init__(self, source: TrainedSource) -> None:
        """Open the data sets. Raise UserError if they are not on this machine."""
        names = ("task.name", "model.name", "data.name")
        given = load_config(source.files, source.overrides)
        config = load_config(source.files, source.overrides, source.state["config"], names)
        if reads_images(config) and given.data.root == Config().data.root:
            if config.data.name == "synthetic":
                overrides = [*source.overrides, f"data.root={given.data.root}"]
                config = load_config(source.files, overrides, source.state["config"], names)
            require_local_data(config.data)
        config = replace(config, device="cpu", precision="fp32", data=replace(config.data, build_cache=False))
        self.task: Task = make_task(config)
        with init_distributed(config):  # datasets() is a collective
            self.datasets: Datasets = datasets_of(self.task)
        load_task_state(self.task, source.state, source.file)
        self.seed = config.seed

    @property
    def batch_count(self) -> int:
        """The number of batches of the test set."""
        return -(-len(self.datasets.test) // self.task.eval_batch_size)

    def test_batches(self) -> Iterator[Data]:
        """Yield the collated samples of the test set, as an evaluation has them."""
        count, size = len(self.datasets.test), self.task.eval_batch_size
        for start in range(0, count, size):
            yield self.read(self.datasets.test, torch.arange(start, min(start + size, count)))

    def training_samples(self, count: int, batch_size: int) -> Iterator[Data]:
        """Yield up to ``count`` evenly spaced samples of the training set, ``batch_size`` in a batch."""
        for rows in _spaced(self.datasets.train, count).split(batch_size):
            yield self.read(self.datasets.train, rows)

    def single_test_samples(self, count: int) -> Iterator[tuple[int, Data]]:
        """Yield up to ``count`` evenly spaced samples of the test set, one in a batch, with their indices."""
        for row in _spaced(self.datasets.test, count).split(1):
            yield int(row), self.read(self.datasets.test, row)

    def read(self, dataset: AnyDataset, indices: Tensor) -> Data:
        """Return the samples at ``indices``, on the CPU."""
        data: Any = read_samples(dataset, self.task.collate, self.seed, indices)
        return data


def _spaced(dataset: AnyDataset, count: int) -> Tensor:
    """Return the indices of up to ``count`` evenly spaced samples."""
    wanted = min(count, len(dataset))
    return torch.tensor([k * (len(dataset) - 1) // max(wanted - 1, 1) for k in range(wanted)])
