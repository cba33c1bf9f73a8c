"""Several datasets as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from distlenet.task import MapDataset

Part = TypeVar("Part", bound=MapDataset)


@dataclass(frozen=True)
class Joined(Generic[Part]):
    """The samples (image, label) of all ``parts``, one part after the other."""

    parts: Sequence[Part]

    def __len__(self) -> int:
        """Return the number of samples of all parts."""
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a sample."""
        part, own_index = self.locate(index)
        image, label = part[own_index]
        return image, label

    def locate(self, index: int) -> tuple[Part, int]:
        """Return the part that contains a sample, and the index of the sample in it."""
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)
