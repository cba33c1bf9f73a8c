"""Predict whether a user likes a film: DeepFM, evaluated by the area under the ROC curve (AUC)."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from movielens import FIELDS, Row, Vocabulary, encode, load_ratings
from torch import Tensor, nn

from distlenet import Config, Datasets, Task, UserError

CodesAndLabels = tuple[Tensor, Tensor]
"""Codes int64 (n, fields + genres), labels float32 (n,)."""


class DeepFM(nn.Module):
    """A factorization machine plus a network on the same embeddings (Guo et al., https://arxiv.org/abs/1703.04247)."""

    def __init__(self, sizes: list[int], width: int, hidden: int, dropout: float) -> None:
        """Make tables for fields of ``sizes`` values, of which the last may occur several times or not at all."""
        super().__init__()
        starts = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("starts", starts[:-1], persistent=False)
        self.linear = nn.Embedding(int(starts[-1]), 1)
        self.factors = nn.Embedding(int(starts[-1]), width)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.factors.weight, std=0.05)
        self.bias = nn.Parameter(torch.zeros(()))
        self.deep = nn.Sequential(
            nn.Linear(len(sizes) * width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logit of each sample, (n,)."""
        single = len(self.starts) - 1
        fields = torch.cat([self.starts[:-1], self.starts[-1:].expand(codes.shape[1] - single)])
        present = (codes > 0).unsqueeze(-1)
        linear = self.linear(codes + fields) * present
        factors = self.factors(codes + fields) * present  # (n, codes, width)
        count = present[:, single:].sum(1, keepdim=True).clamp(min=1)
        genre = factors[:, single:].sum(1, keepdim=True) / count
        factors = torch.cat([factors[:, :single], genre], 1)  # (n, fields, width)
        linear = linear[:, :single].sum((1, 2)) + (linear[:, single:].sum(1, keepdim=True) / count).sum((1, 2))
        pairs = (factors.sum(1).square() - factors.square().sum(1)).sum(1) / 2
        return self.bias + linear + pairs + self.deep(factors.flatten(1)).squeeze(1)


class Ratings(Task):
    """``data.root`` is the wheel of RecBole."""

    eval_batch_size = 2000

    def __init__(self, config: Config, width: int = 32, hidden: int = 128, dropout: float = 0.5) -> None:
        super().__init__(config)
        self.width, self.hidden, self.dropout = width, hidden, dropout
        self.vocabulary: Vocabulary = {}

    def model(self) -> nn.Module:
        """Return a new network. It depends on the vocabulary: ``datasets`` or ``load_state_dict`` is called before."""
        sizes = [len(self.vocabulary[name]) + 1 for name in (*FIELDS, "genre")]
        return DeepFM(sizes, self.width, self.hidden, self.dropout)

    def datasets(self) -> Datasets:
        """Read the ratings."""
        data, self.vocabulary = load_ratings(self.config.data.root)
        return data

    def loss(self, model: nn.Module, data: CodesAndLabels) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each sample in nats, and the logits."""
        codes, labels = data
        logits = model(codes)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), logits

    def metrics(self, outputs: Tensor, data: CodesAndLabels) -> dict[str, Tensor]:
        """Return whether each sample is classified correctly."""
        return {"accuracy": (outputs > 0) == (data[1] > 0)}

    def prediction(self, outputs: Tensor, data: CodesAndLabels) -> dict[str, Tensor]:
        """Return what ``summary_metrics`` needs of each sample."""
        return {"score": outputs, "label": data[1]}

    def summary_metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Return the AUC over all samples."""
        return {"auc": area_under_curve(predictions["score"], predictions["label"])}

    def predict(self, model: nn.Module, data: Tensor) -> Tensor:
        """Return the probability that each sample, given by its codes, is a positive one."""
        return model(data).sigmoid()

    def encode(self, rows: Iterable[Row]) -> Tensor:
        """Return the codes of new samples, given by the columns of MovieLens."""
        return encode(rows, self.vocabulary)

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary: the meaning of the codes."""
        return {"vocabulary": self.vocabulary}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the vocabulary of the training. Raise UserError if the data has another one."""
        if self.vocabulary not in ({}, state["vocabulary"]):
            root = self.config.data.root
            raise UserError(f"data.root={root}: not the users and films of the training; give the file of the training")
        self.vocabulary = state["vocabulary"]


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Return the probability that a positive sample has a higher score than a negative one; a tie counts half.

    It is the Mann-Whitney U statistic. Ranks are multiples of 1/2, so their float64 sum is exact.
    """
    _, position, count = scores.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0).double() - (count - 1) / 2.0)[position]
    positive = labels > 0
    n, m = int(positive.sum()), int((~positive).sum())
    return (float(rank[positive].sum()) - n * (n + 1) / 2) / max(n * m, 1)
