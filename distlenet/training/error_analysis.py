"""What a test says beyond its two numbers: which classes are taken for which, and the surest mistakes."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distlenet.distributed.collectives import gather, sum_over_ranks
from distlenet.tracking.base import TEST_FILE, Record
from distlenet.utils.errors import warn
from distlenet.utils.files import replace_text

MISTAKES = 24
"""How many are kept."""


class Details:
    """Adds up a test set's confusion matrix, and keeps the mistakes that the network was surest of.

    Memory does not grow with the set. Of equally sure mistakes the one with the smaller index counts as surer, so
    that the result does not depend on the number of ranks.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        """Begin with nothing, for a network of so many classes."""
        self.classes, self.device = classes, device
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # [label, predicted]
        self.kept = torch.zeros(0, 4, dtype=torch.float64, device=device)  # confidence, index, label, predicted

    def update(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take logits (n, C), labels (n,) and the samples' places in the set (n,). No host sync."""
        confidence, predicted = logits.double().softmax(1).max(1)
        cells = torch.zeros(self.classes**2, dtype=torch.int64, device=self.device)
        cells.scatter_add_(0, labels * self.classes + predicted, torch.ones_like(labels))
        self.confusion += cells.view(self.classes, self.classes)
        wrong = predicted != labels
        surest = torch.where(wrong, confidence, -1.0)  # right ones sort last, without a host sync
        rows = torch.stack([surest, indices.to(self.device).double(), labels.double(), predicted.double()], 1)
        self.kept = _surest(torch.cat([self.kept, rows]))

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Return confusion (C, C) and mistakes (k, 4) of all ranks. A collective, then a host sync."""
        mine = torch.full((MISTAKES, 4), -1.0, dtype=torch.float64, device=self.device)
        mine[: len(self.kept)] = self.kept
        mistakes = _surest(gather(mine.flatten()).view(-1, 4)).cpu()
        return sum_over_ranks(self.confusion).long().cpu(), mistakes[mistakes[:, 0] >= 0]


def _surest(rows: Tensor) -> Tensor:
    """Keep the rows (n, 4) of greatest confidence, of equal ones those of smallest index, in that order."""
    rows = rows[rows[:, 1].argsort()]
    return rows[rows[:, 0].argsort(descending=True, stable=True)][:MISTAKES]


def write_details(folder: Path, confusion: Tensor, mistakes: Tensor, images: Tensor, classes: Sequence[str]) -> None:
    """Write ``test.json``: classes, confusion matrix, and the mistakes with their ``images``, uint8 (N, H, W), as PNG.

    Where it cannot be written, a warning: no training fails for its pictures.
    """
    found = [
        {
            "index": int(index),
            "label": int(label),
            "predicted": int(predicted),
            "confidence": confidence,
            "png": to_png(images[int(index)]),
        }
        for confidence, index, label, predicted in mistakes.tolist()
    ]
    content: Record = {"classes": list(classes), "confusion": confusion.tolist(), "mistakes": found}
    try:
        replace_text(folder / TEST_FILE, json.dumps(content) + "\n")
    except OSError as error:
        warn(f"{folder / TEST_FILE}: cannot be written: {error.strerror or error}; the report has no confusion matrix")


def to_png(image: Tensor) -> str:
    """Write one grey image, uint8 (H, W), as PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
