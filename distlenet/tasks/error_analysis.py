"""The confusion matrix and the most confident mistakes of the final evaluation."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distlenet.distributed.collectives import gather, sum_over_ranks

MAX_MISTAKES = 24


class ClassificationErrors:
    """Count predictions by label, and keep the mistakes of the highest confidence.

    Memory does not grow with the test set. Equally confident mistakes are ordered by index, so the result does not
    depend on the number of ranks.
    """

    def __init__(self, images: Tensor, classes: Sequence[str], device: torch.device) -> None:
        """Start empty, for the test ``images``, uint8 (N, H, W)."""
        self.images, self.classes, self.device = images, classes, device
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)  # [label, predicted]
        self.mistakes = torch.zeros(0, 4, dtype=torch.float64, device=device)  # confidence, index, label, predicted

    def update(self, outputs: Tensor, data: tuple[Tensor, Tensor], indices: Tensor) -> None:
        """Add logits (n, C) for inputs and labels (n,) with dataset indices (n,). No host sync."""
        labels = data[1]
        confidence, predicted = outputs.double().softmax(1).max(1)
        cells = torch.zeros(self.confusion.numel(), dtype=torch.int64, device=self.device)
        cells.scatter_add_(0, labels * len(self.classes) + predicted, torch.ones_like(labels))
        self.confusion += cells.view_as(self.confusion)
        confidence = torch.where(predicted != labels, confidence, -1.0)  # correct ones sort last, without a host sync
        rows = torch.stack([confidence, indices.to(self.device).double(), labels.double(), predicted.double()], 1)
        self.mistakes = _most_confident(torch.cat([self.mistakes, rows]))

    def report(self) -> dict[str, Any]:
        """Return classes, confusion matrix and mistakes with their images as PNG. A collective, then a host sync."""
        padded = torch.full((MAX_MISTAKES, 4), -1.0, dtype=torch.float64, device=self.device)
        padded[: len(self.mistakes)] = self.mistakes
        mistakes = _most_confident(gather(padded.flatten()).view(-1, 4)).cpu()
        confusion = sum_over_ranks(self.confusion).long().cpu()
        rows = [
            {
                "index": int(index),
                "label": int(label),
                "predicted": int(predicted),
                "confidence": confidence,
                "png": encode_png(self.images[int(index)]),
            }
            for confidence, index, label, predicted in mistakes[mistakes[:, 0] >= 0].tolist()
        ]
        return {"classes": list(self.classes), "confusion": confusion.tolist(), "mistakes": rows}


def _most_confident(rows: Tensor) -> Tensor:
    """Keep the rows (n, 4) of the highest confidence, ties by index, in that order."""
    rows = rows[rows[:, 1].argsort()]
    return rows[rows[:, 0].argsort(descending=True, stable=True)][:MAX_MISTAKES]


def encode_png(image: Tensor) -> str:
    """Encode a grey image, uint8 (H, W), as PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.cpu().numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
