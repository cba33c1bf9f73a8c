"""Set the order in which the file system lists directories: it differs between machines, so nothing may depend on it.

``glob``, ``os.walk``, ``pathlib`` and torchvision list directories through these two functions of ``os``.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

LISTDIR, SCANDIR = os.listdir, os.scandir


class SortedScan:
    """Replaces the iterator that ``os.scandir`` returns."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries: Iterator[Any] = iter(entries)

    def __iter__(self) -> Iterator[Any]:
        """Return the entries."""
        return self.entries

    def __next__(self) -> Any:
        """Return the next entry."""
        return next(self.entries)

    def __enter__(self) -> "SortedScan":
        """Return this iterator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: the directory is closed."""


def sort_listings(descending: bool) -> None:
    """List directories by name from now on, in ascending or descending order, in this process."""

    def listdir(*arguments: Any) -> list[Any]:
        return sorted(LISTDIR(*arguments), reverse=descending)

    def scandir(*arguments: Any) -> SortedScan:
        with SCANDIR(*arguments) as entries:
            return SortedScan(sorted(entries, key=lambda entry: entry.name, reverse=descending))

    os.listdir, os.scandir = listdir, scandir  # type: ignore[assignment]
    if globber := getattr(glob, "_StringGlobber", None):  # pathlib, since Python 3.13
        globber.scandir = staticmethod(scandir)
