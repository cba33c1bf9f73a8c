"""The reference: connected components of bright pixels, classified by logistic regression on their pixels.

``python baseline.py DATA`` prints its figures on the scenes of the test set; DATA is the directory of Fashion-MNIST.
The classifier is fitted to the true boxes of training scenes.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from detection import DETECTIONS, Detection
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from distlenet import load_config

BRIGHT = 64  # as bright as the brightest background
MIN_AREA = 40  # pixels of a box; smaller components are noise


def find_boxes(image: Tensor) -> Tensor:
    """Return the boxes of connected components, (m, 4)."""
    mask = ndimage.binary_opening(ndimage.median_filter(image.numpy(), 3) >= BRIGHT)
    slices = ndimage.find_objects(ndimage.label(mask)[0])
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in slices]
    return torch.tensor([b for b in boxes if (b[2] - b[0]) * (b[3] - b[1]) >= MIN_AREA]).reshape(-1, 4)[:DETECTIONS]


def cut(image: Tensor, boxes: Tensor) -> np.ndarray:
    """Return the pixels of each box, resized to 28×28: (m, 784)."""
    parts = [image[None, None, top:bottom, left:right] for left, top, right, bottom in boxes.int().tolist()]
    resized = [F.interpolate(part.float() / 255, (28, 28), mode="bilinear", antialias=True) for part in parts]
    return torch.cat(resized).flatten(1).numpy()


task = Detection(load_config([], [f"data.root={sys.argv[1]}", "data.validation=0.1"]))
scenes = task.datasets()
train = [scenes.train[index] for index in range(6000)]
classifier = LogisticRegression(C=0.05, max_iter=300)
classifier.fit(np.concatenate([cut(image, boxes) for image, boxes, _ in train]), torch.cat([s[2] for s in train]))
detections, targets = [], []
for image, true_boxes, true_labels in (scenes.test[index] for index in range(len(scenes.test))):
    found = {
        "boxes": torch.zeros(DETECTIONS, 4),
        "labels": torch.zeros(DETECTIONS).long(),
        "scores": torch.zeros(DETECTIONS),
    }
    boxes = find_boxes(image)
    if len(boxes):
        probabilities = torch.from_numpy(classifier.predict_proba(cut(image, boxes))).float()
        scores, labels = probabilities.max(1)
        order = scores.argsort(descending=True, stable=True)
        for name, values in (("boxes", boxes.float()), ("labels", labels), ("scores", scores)):
            found[name][: len(order)] = values[order]
    detections.append(found)
    targets.append((true_boxes, true_labels))
outputs = {name: torch.stack([found[name] for found in detections]) for name in ("boxes", "labels", "scores")}
data = (torch.empty(0), targets)
by_scene = {name: float(values.mean()) for name, values in task.metrics(outputs, data).items()}
print({**by_scene, **task.summary_metrics(task.prediction(outputs, data))})
