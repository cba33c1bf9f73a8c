"""A small correct task, and tasks that break the contract in one way each, for the tests of ``distlenet.prove``."""

import os
import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import get_worker_info

from distlenet.task import Datasets, Task

CLASSES = 3


class Points:
    """A map-style dataset of points around three centers; ``spread`` is drawn from the seeded generator."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        label = index % CLASSES
        return torch.eye(4)[label] + 0.3 * torch.randn(4), label


class Correct(Task):
    """Classify the points. Noise from keys, in training only."""

    eval_batch_size = 16
    dataset = Points

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def datasets(self):
        return Datasets(self.dataset(96), self.dataset(40))

    def transform(self, data, keys):
        points, labels = data
        if keys is not None:
            points = points + (keys.bits() % 7).unsqueeze(1) / 70
        return points, labels

    def loss(self, model, data):
        points, labels = data
        outputs = model(points)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs

    def metrics(self, outputs, data):
        return {"accuracy": outputs.argmax(1) == data[1]}


class OwnGenerator(Correct):
    """Unkeyed randomness in the dataset."""

    class dataset(Points):
        generator = random.Random(0)

        def __getitem__(self, index):
            point, label = super().__getitem__(index)
            return (point if self.generator.random() < 0.5 else point.flip(0)), label


class UnkeyedTransform(Correct):
    def transform(self, data, keys):
        points, labels = data
        return (points + 0.01 * torch.rand_like(points) if keys is not None else points), labels


class Padded(Correct):
    """Points as series of different lengths, padded with 0 in the loss; behind BatchNorm, padding is not 0."""

    def model(self):
        first = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4), nn.ReLU())
        return nn.ModuleList([first, nn.Conv1d(4, CLASSES, 3, padding=1)])

    def transform(self, data, keys):
        points, labels = super().transform(data, keys)
        return [point.repeat(10)[: 10 * (2 + int(label))] for point, label in zip(points, labels, strict=True)], labels

    def loss(self, model, data):
        series, labels = data
        lengths = torch.tensor([len(values) for values in series])
        padded = nn.utils.rnn.pad_sequence(series, batch_first=True)
        outputs = model[1](model[0](padded.unsqueeze(1)))
        mask = torch.arange(padded.shape[1]) < lengths.unsqueeze(1)
        outputs = (outputs * mask.unsqueeze(1)).sum(2) / lengths.unsqueeze(1)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs


class MixingLoss(Correct):
    """Each loss is relative to the batch's largest."""

    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return losses / losses.detach().max(), outputs


class MeanLoss(Correct):
    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return losses.mean(), outputs


class ExpandedMean(Correct):
    """It has the right shape, and the right value for one sample."""

    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return losses.mean().expand(len(losses)), outputs


class MixingMetric(Correct):
    """The recall of the batch, for each of its samples."""

    def metrics(self, outputs, data):
        positive = data[1] == 0
        recall = (positive & (outputs.argmax(1) == 0)).sum() / positive.sum().clamp(min=1)
        return {"recall": recall.expand(len(outputs))}


class FileOrder(Correct):
    """The samples are files, in the order in which the file system lists them."""

    class dataset(Points):
        def __init__(self, samples):
            super().__init__(samples)
            directory = Path(tempfile.gettempdir()) / f"distlenet-prove-files-{samples}-{os.getuid()}"
            directory.mkdir(exist_ok=True)
            for number in range(samples):
                (directory / f"{number:03}").touch()
            self.numbers = [int(path.name) for path in directory.iterdir()]

        def __getitem__(self, index):
            return super().__getitem__(self.numbers[index])


class HashOrder(FileOrder):
    """The samples are those of a set of strings."""

    class dataset(Points):
        def __init__(self, samples):
            super().__init__(samples)
            self.numbers = [int(name) for name in {f"{number}" for number in range(samples)}]

        def __getitem__(self, index):
            return super().__getitem__(self.numbers[index])


class GlobalCounter(Correct):
    """The samples get brighter with each sample loaded before."""

    class dataset(Points):
        loaded = 0

        def __getitem__(self, index):
            GlobalCounter.dataset.loaded += 1
            point, label = super().__getitem__(index)
            return point + GlobalCounter.dataset.loaded * 1e-3, label


class RunningMean(nn.Module):
    """Centers its input by a running mean that is a plain attribute: no checkpoint contains it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(4)

    def forward(self, points):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * points.detach().mean(0)
        return points - self.mean


class HiddenState(Correct):
    def model(self):
        return nn.Sequential(RunningMean(), super().model())


class LateState(Correct):
    """A state that grows only after three training steps: two calls do not show it."""

    class Late(RunningMean):
        calls = 0

        def forward(self, points):
            self.calls += self.training
            return super().forward(points) if self.calls > 3 else points

    def model(self):
        return nn.Sequential(self.Late(), super().model())


class OfTheRank(Correct):
    """The samples of rank 1 are moved."""

    class dataset(Points):
        def __getitem__(self, index):
            point, label = super().__getitem__(index)
            return point + 0.1 * int(os.environ.get("RANK", "0")), label


class OfTheWorker(Correct):
    """The samples of loader workers are moved."""

    class dataset(Points):
        def __getitem__(self, index):
            point, label = super().__getitem__(index)
            return point + 0.1 * (get_worker_info() is not None), label


class PaddingCollate(Correct):
    """Words, padded to the longest of the batch."""

    def collate(self, samples):
        longest = max(label for _, label in samples)
        points, labels = super().collate(samples)
        return F.pad(points, (0, longest)), labels

    def transform(self, data, keys):
        points, labels = data
        return points[:, :4], labels


class BatchTransform(Correct):
    def transform(self, data, keys):
        points, labels = data
        return points - points.mean(0), labels


class ExpandedMeanOfZeros(ExpandedMean):
    """At first, all samples have the same loss."""

    def model(self):
        model = super().model()
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model


class RandomLoss(Correct):
    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return losses + 0.01 * torch.rand_like(losses), outputs


class Noise(nn.Module):
    def forward(self, points):
        return points + 0.01 * torch.rand_like(points)


class Centered(nn.Module):
    def forward(self, points):
        return points - points.mean(0)


class RandomModel(Correct):
    def model(self):
        return nn.Sequential(Noise(), super().model())


class MixingModel(Correct):
    def model(self):
        return nn.Sequential(Centered(), super().model())


class MeanMetric(Correct):
    def metrics(self, outputs, data):
        return {"accuracy": (outputs.argmax(1) == data[1]).float().mean()}
