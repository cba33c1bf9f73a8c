"""Find and classify the items of a scene, with an anchor-free detector: CenterNet (https://arxiv.org/abs/1904.07850)."""

from typing import Any

import torch
import torch.nn.functional as F
from scenes import MAX_ITEMS, SIDES, SIZE, Scenes, collate, overlap
from torch import Tensor, nn

from distlenet import Config, Datasets, ImageClassification, SampleKeys, Task

STRIDE = 4  # pixels of a cell of the heat map
CELLS = SIZE // STRIDE
DETECTIONS = 16  # per scene, sorted by score
THRESHOLDS = (0.5, 0.75)  # intersection over union from which a detection is right

Targets = list[tuple[Tensor, Tensor]]
"""Boxes float32 (m, 4) and labels int64 (m,) of each scene."""

Scored = dict[str, Tensor]
"""Detections: boxes (n, DETECTIONS, 4), labels and scores (n, DETECTIONS)."""


class CenterNet(nn.Module):
    """A heat map of centers per class, and offset and size of the box in each cell. It computes its own loss."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        plan = [(1, width // 2, 2), (width // 2, width, 2), *[(width, width, 1)] * 4]
        for before, after, stride in plan:
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(4, after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, classes + 4, 1)
        nn.init.constant_(self.head.bias[:classes], -4.0)  # centers are rare
        steps = torch.arange(CELLS, dtype=torch.float32)
        self.register_buffer("cells", torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1), persistent=False)

    def forward(self, images: Tensor, targets: Targets | None = None) -> tuple[Tensor, Scored]:
        """Return the loss of each scene (n,), 0 without targets, and the detections."""
        maps = self.head(self.body(images)).float()
        heat, offsets, sizes = maps.split([self.classes, 2, 2], 1)
        offsets, sizes = offsets.permute(0, 2, 3, 1), sizes.permute(0, 2, 3, 1)  # (n, CELLS, CELLS, 2)
        losses = heat.new_zeros(len(heat)) if targets is None else self.losses(heat, offsets, sizes, targets)
        return losses, self.detect(heat.detach(), offsets.detach(), sizes.detach())

    def losses(self, heat: Tensor, offsets: Tensor, sizes: Tensor, targets: Targets) -> Tensor:
        """Return focal loss of the heat map plus L1 losses of the boxes, per item of a scene."""
        boxes, labels, real = pad(targets)
        centers, spans = (boxes[..., :2] + boxes[..., 2:]) / 2 / STRIDE, (boxes[..., 2:] - boxes[..., :2]) / STRIDE
        cells = centers.floor().clamp(0, CELLS - 1)
        distance = (self.cells - cells[:, :, None, None]) / (spans[:, :, None, None] / 6).clamp(min=0.4)
        bumps = (-distance.square().sum(-1) / 2).exp() * real[:, :, None, None]  # (n, m, CELLS, CELLS)
        of_class = F.one_hot(labels, self.classes)[..., None, None]  # (n, m, classes, 1, 1)
        wanted = (bumps.unsqueeze(2) * of_class).amax(1)
        positive, probability = wanted == 1, heat.sigmoid()
        focal = torch.where(
            positive,
            -F.logsigmoid(heat) * (1 - probability).square(),
            -F.logsigmoid(-heat) * probability.square() * (1 - wanted).pow(4),
        )
        column, row = cells.long().unbind(-1)
        scene = torch.arange(len(boxes), device=boxes.device).unsqueeze(1)
        box_loss = F.l1_loss(offsets[scene, row, column], centers - cells, reduction="none")
        box_loss = box_loss + 0.5 * F.l1_loss(sizes[scene, row, column], spans, reduction="none")
        items = real.sum(1)
        return (focal.sum((1, 2, 3)) + (box_loss.sum(-1) * real).sum(1)) / items

    def detect(self, heat: Tensor, offsets: Tensor, sizes: Tensor) -> Scored:
        """Return the highest local maxima of the heat map, sorted."""
        peaks = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, -torch.inf)
        scores, places = peaks.flatten(1).topk(DETECTIONS)
        labels, cells = places // CELLS**2, places % CELLS**2
        scene = torch.arange(len(heat), device=heat.device).unsqueeze(1)
        centers = (self.cells.flatten(0, 1)[cells] + offsets.flatten(1, 2)[scene, cells]) * STRIDE
        half = sizes.flatten(1, 2)[scene, cells].clamp(0, SIDES[1]) * STRIDE / 2
        return {"boxes": torch.cat([centers - half, centers + half], -1), "labels": labels, "scores": scores.sigmoid()}


class Detection(Task):
    """Scenes of the images of ``data.name``; the validation set, of those that ``data.validation`` splits off."""

    def __init__(
        self,
        config: Config,
        width: int = 32,
        train_scenes: int = 10000,
        validation_scenes: int = 1000,
        test_scenes: int = 2000,
    ) -> None:
        super().__init__(config)
        self.width = width
        self.counts = {"train": train_scenes, "validation": validation_scenes, "test": test_scenes}
        self.classes: list[str] = []

    def model(self) -> nn.Module:
        """Return a new network. It depends on the classes: ``datasets`` or ``load_state_dict`` is called before."""
        return CenterNet(len(self.classes), self.width)

    def datasets(self) -> Datasets:
        """Return scenes; each split is composed of the images of that split."""
        items = ImageClassification(self.config).datasets()
        self.classes = list(items.classes or ())
        splits = {"train": items.train, "validation": items.validation, "test": items.test}
        scenes = {
            name: Scenes(images, self.counts[name], seed)
            for seed, (name, images) in enumerate(splits.items(), 1)
            if images is not None
        }
        return Datasets(
            **scenes, source=f"scenes of {items.source}", classes=self.classes, fingerprint=items.fingerprint
        )

    collate = staticmethod(collate)

    def transform(self, data: tuple[Tensor, Targets], keys: SampleKeys | None) -> tuple[Tensor, Targets]:
        """Scale the pixels; in training, mirror half of the scenes with their boxes."""
        images, targets = data
        images = images.unsqueeze(1) / 255
        if keys is None:
            return images, targets
        mirrored = keys.bernoulli("mirror", 0.5)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, [(mirror(boxes, m), labels) for (boxes, labels), m in zip(targets, mirrored, strict=True)]

    def loss(self, model: nn.Module, data: tuple[Tensor, Targets]) -> tuple[Tensor, Scored]:
        """Return what the network computes."""
        return model(*data)

    def metrics(self, outputs: Scored, data: tuple[Tensor, Targets]) -> dict[str, Tensor]:
        """Return the average precision within each scene, over all classes."""
        items = torch.tensor([len(labels) for _, labels in data[1]], device=outputs["scores"].device)
        return {"ap50": average_precision(right_detections(outputs, data[1], THRESHOLDS[0]), items)}

    def prediction(self, outputs: Scored, data: tuple[Tensor, Targets]) -> dict[str, Tensor]:
        """Return which detections of each scene are right, and the number of items of each class."""
        labels = pad(data[1])[1:]
        items = (F.one_hot(labels[0], len(self.classes)) * labels[1].unsqueeze(-1)).sum(1)
        right = [right_detections(outputs, data[1], threshold) for threshold in THRESHOLDS]
        return {**outputs, "right": torch.stack(right, 2), "items": items}

    def summary_metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """Return the mean over classes of the average precision over all scenes."""
        order = predictions["scores"].flatten().argsort(descending=True, stable=True)
        labels, items = predictions["labels"].flatten()[order], predictions["items"].sum(0)
        right = predictions["right"].flatten(0, 1)[order]  # (detections, thresholds)
        present = [label for label in range(len(self.classes)) if items[label]]
        return {
            f"map{threshold * 100:.0f}": sum(
                float(average_precision(right[labels == label, number][None], items[label, None])) for label in present
            )
            / len(present)
            for number, threshold in enumerate(THRESHOLDS)
        }

    def predict(self, model: nn.Module, data: Tensor) -> Scored:
        """Return the detections in images, uint8 (n, SIZE, SIZE)."""
        return model(data.unsqueeze(1) / 255)[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the class names."""
        return {"classes": self.classes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the class names of the training."""
        self.classes = state["classes"]


def mirror(boxes: Tensor, mirrored: Tensor) -> Tensor:
    """Return boxes (m, 4) of the mirrored scene, if ``mirrored``, a scalar, is true."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.where(mirrored, torch.stack([SIZE - right, top, SIZE - left, bottom], 1), boxes)


def pad(targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (n, MAX_ITEMS, 4), labels (n, MAX_ITEMS), and which of them are real."""
    counts = torch.tensor([len(labels) for _, labels in targets], device=targets[0][0].device)
    boxes = torch.stack([F.pad(boxes, (0, 0, 0, MAX_ITEMS - len(boxes))) for boxes, _ in targets])
    labels = torch.stack([F.pad(labels, (0, MAX_ITEMS - len(labels))) for _, labels in targets])
    return boxes, labels, torch.arange(MAX_ITEMS, device=counts.device) < counts.unsqueeze(1)


def right_detections(detections: Scored, targets: Targets, threshold: float) -> Tensor:
    """Return which detections match an item of their class that no better detection matched: bool (n, DETECTIONS)."""
    boxes, labels, free = pad(targets)
    scores = overlap(detections["boxes"], boxes) * (detections["labels"].unsqueeze(-1) == labels.unsqueeze(-2))
    right = []
    for k in range(DETECTIONS):
        score, item = (scores[:, k] * free).max(1)
        right.append(score >= threshold)
        free = free & ~(F.one_hot(item, MAX_ITEMS).bool() & right[-1].unsqueeze(1))
    return torch.stack(right, 1)


def average_precision(right: Tensor, items: Tensor) -> Tensor:
    """Return the area under precision over recall, for detections sorted by score: (n, k) of (n,) items give (n,)."""
    number = torch.arange(1, right.shape[1] + 1, device=right.device)
    precision = right.cumsum(1).double() / number
    highest = precision.flip(1).cummax(1).values.flip(1)  # at this recall or a higher one
    return (highest * right).sum(1) / items
