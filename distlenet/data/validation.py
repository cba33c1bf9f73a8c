"""Split a validation set off the training set: always the same samples, on all ranks and with every seed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distlenet.data.image_dataset import ImageDataset
from distlenet.task import BatchDataset, Datasets, MapDataset
from distlenet.utils.errors import UserError
from distlenet.utils.keyed_random import hash32

SPLIT_KEY = 0x56414C49  # constant, so that runs with different seeds have the same validation set


@dataclass(frozen=True)
class Subset:
    """The samples ``rows``, int64 (n,), of a map-style dataset."""

    dataset: MapDataset
    rows: Tensor

    def __len__(self) -> int:
        """Return n."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.dataset[int(self.rows[index])]


def split_rows(samples: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the validation samples, int64, both ascending.

    The validation set consists of round(``fraction`` × ``samples``) samples: those with the smallest hash of the index;
    equal hashes are ordered by index.
    """
    order = hash32(torch.arange(samples), SPLIT_KEY).argsort(stable=True)
    count = round(fraction * samples)
    return order[count:].sort().values, order[:count].sort().values


def split_validation(datasets: Datasets, fraction: float) -> Datasets:
    """Move ``fraction`` of the training set to a validation set; 0 changes nothing.

    Raise UserError if the source has a validation set, or if one of the two parts would be empty.
    """
    if fraction == 0:
        return datasets
    if datasets.validation is not None:
        raise UserError(f"data.validation={fraction:g}: the data has a validation set; leave data.validation at 0")
    train_rows, validation_rows = split_rows(len(datasets.train), fraction)
    if not len(train_rows) or not len(validation_rows):
        raise UserError(
            f"data.validation={fraction:g}: splits {len(datasets.train)} samples into {len(train_rows)} and "
            f"{len(validation_rows)}; expected at least one each"
        )
    return replace(
        datasets,
        train=_select(datasets.train, train_rows),
        validation=_select(datasets.train, validation_rows),
    )


def _select(dataset: Any, rows: Tensor) -> MapDataset | BatchDataset:
    return dataset.select(rows) if isinstance(dataset, ImageDataset) else Subset(dataset, rows)
