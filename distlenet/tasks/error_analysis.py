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

    def __init__(self, dataset: Any, classes: Sequence[str], device: torch.device) -> None:
        """Start empty, for the test set ``dataset``, whose samples are (image, label)."""
        self.dataset, self.classes, self.device = dataset, classes, device
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)  # [label, predicted]
        self.mistakes = torch.zeros(0, 4, dtype=torch.float64, device=device)  # confidence, index, label, predicted

    def update(self, outputs: Tensor, data: tuple[Tensor, Tensor], indices: Tensor) -> None:
        """Add logits (n, C) for inputs and labels (n,) with dataset indices (n,). No host sync.

        Raise ValueError if the outputs are not logits.
        """
        if outputs.dim() != 2 or outputs.shape[1] != len(self.classes):
            raise ValueError(f"expected outputs (n, {len(self.classes)}), one per class, but got {list(outputs.shape)}")
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
                "png": encode_png(self.dataset[int(index)][0]),
            }
            for confidence, index, label, predicted in mistakes[mistakes[:, 0] >= 0].tolist()
        ]
        return {"classes": list(self.classes), "confusion": confusion.tolist(), "mistakes": rows}


def _most_confident(rows: Tensor) -> Tensor:
    """Keep the rows (n, 4) of the highest confidence, ties by index, in that order."""
    rows = rows[rows[:, 1].argsort()]
    return rows[rows[:, 0].argsort(descending=True, stable=True)][:MAX_MISTAKES]


def encode_png(image: Tensor) -> str:
    """Encode an image, uint8 or floating point, (H, W) or (C, H, W), as PNG in base64: grey, or color if C is 3."""
    from PIL import Image

    image = image.cpu()
    if image.dim() == 3:  # of other numbers of channels, the first is shown
        image = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    if image.dtype != torch.uint8:
        low, high = min(float(image.min()), 0.0), float(image.max())
        if low < 0 or not high <= 255:  # normalised already: show the whole range
            image, high = image - low, max(high - low, 1e-9)
        image = (image * (255 / (255 if high > 1 and low == 0 else max(high, 1)))).round().clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(image.contiguous().numpy()).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
