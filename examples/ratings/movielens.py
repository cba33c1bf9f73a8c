"""MovieLens-100k as a table of categorical fields, read from the wheel of RecBole without unpacking it."""

import csv
import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distlenet import Datasets, SampleKeys, UserError

FIELDS = {
    "user": "user_id",
    "film": "item_id",
    "age": "age",
    "gender": "gender",
    "occupation": "occupation",
    "year": "release_year",
}
"""Fields with one value per rating, and their columns. In addition, ``genre`` has up to MAX_GENRES values."""

GENRES = "class"  # the column of the genres, separated by spaces
MAX_GENRES = 6
LIKED = 4.0  # stars; a rating of at least this is a positive label
VALIDATION, TEST = 0.1, 0.1  # shares of the ratings

Row = dict[str, str]
Vocabulary = dict[str, list[str]]
"""The values of each field. The code of a value is its position + 1; 0 is for a missing or an unknown value."""


@dataclass(frozen=True)
class Ratings:
    """Ratings in memory, served as whole batches."""

    codes: Tensor  # int64 (n, len(FIELDS) + MAX_GENRES)
    labels: Tensor  # float32 (n,), 0 or 1

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and labels of some ratings."""
        return self.codes[indices], self.labels[indices]

    def digest(self) -> str:
        """Return the SHA-256 of codes and labels."""
        return hashlib.sha256(self.codes.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


def load_ratings(wheel: str) -> tuple[Datasets, Vocabulary]:
    """Read all ratings, and split them by a hash of their position: the same split for every run."""
    ratings, users, films = (read_table(wheel, f"ml-100k.{name}") for name in ("inter", "user", "item"))
    rows = [*users, *films]
    vocabulary = {name: sorted({row[column] for row in rows if row.get(column)}) for name, column in FIELDS.items()}
    vocabulary["genre"] = sorted({genre for film in films for genre in film[GENRES].split()})
    # A row of a user has code 0 in the fields of films, and the other way round.
    codes = encode(users, vocabulary)[positions(ratings, users, "user_id")]
    codes += encode(films, vocabulary)[positions(ratings, films, "item_id")]
    labels = torch.tensor([float(float(row["rating"]) >= LIKED) for row in ratings])
    order = SampleKeys(0, 0, torch.arange(len(labels))).bits().argsort(stable=True)
    test, validation = round(TEST * len(labels)), round(VALIDATION * len(labels))
    splits = {
        "train": order[test + validation :],
        "validation": order[test : test + validation],
        "test": order[:test],
    }
    data = {name: Ratings(codes[rows], labels[rows]) for name, rows in splits.items()}
    fingerprint = {name: split.digest() for name, split in data.items()}
    source = f"MovieLens-100k in {wheel}"
    return Datasets(**data, source=source, classes=["no", "yes"], fingerprint=fingerprint), vocabulary


def positions(ratings: list[Row], rows: list[Row], column: str) -> Tensor:
    """Return the index of the row of each rating, int64 (n,)."""
    position = {row[column]: index for index, row in enumerate(rows)}
    return torch.tensor([position[rating[column]] for rating in ratings])


def encode(rows: Iterable[Row], vocabulary: Vocabulary) -> Tensor:
    """Return the codes of some rows, int64 (n, len(FIELDS) + MAX_GENRES)."""
    tables = {name: {value: code for code, value in enumerate(values, 1)} for name, values in vocabulary.items()}
    codes = []
    for row in rows:
        genres = [tables["genre"].get(genre, 0) for genre in row.get(GENRES, "").split()][:MAX_GENRES]
        single = [tables[name].get(row.get(column, ""), 0) for name, column in FIELDS.items()]
        codes.append([*single, *genres, *[0] * (MAX_GENRES - len(genres))])
    return torch.tensor(codes)


def read_table(wheel: str, name: str) -> list[Row]:
    """Return the rows of one table in the wheel. Raise UserError if it is not there."""
    path = f"recbole/dataset_example/ml-100k/{name}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            text = archive.read(path).decode()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"data.root={wheel}: cannot read {path}: {error}; download the file with "
            "`pip download --no-deps recbole==1.2.1` and give its path"
        ) from error
    rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{column.partition(":")[0]: value for column, value in row.items()} for row in rows]
