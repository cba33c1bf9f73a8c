"""Tasks, networks and data for the tests of the export, by names such as ``task.name=export_tasks:Pairs``."""

import os
import signal

import torch
from torch import Tensor, nn

from distlenet import Datasets, ImageClassification, Task


def colors(count: int = 40) -> Datasets:
    """Return uint8 images (3, 12, 10) of three classes, by their brightest channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (count, 3, 12, 10), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 3
    images[torch.arange(count), labels] += 55
    samples = list(zip(images, labels.tolist(), strict=True))
    return Datasets(samples, samples, classes=("red", "green", "blue"))


class SmallResNet(nn.Module):
    """BatchNorm, a residual branch, dropout, and one convolution with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = self.first
        self.norm, self.dropout, self.head = nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.norm(self.second(self.first(x)))).relu()
        return self.head(self.dropout(x.mean((2, 3))))


class WrongWhenExported(ImageClassification):
    """The exported network adds 0.01 to one logit."""

    def predict(self, model: nn.Module, data: Tensor) -> Tensor:
        logits = super().predict(model, data)
        return logits + 0.01 * torch.eye(10)[0] if torch.compiler.is_exporting() else logits


class KilledWhenExported(ImageClassification):
    """The process is killed during the export."""

    def predict(self, model: nn.Module, data: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(model, data)


class Mixing(nn.Module):
    """A network whose outputs for a sample depend on the other samples of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(360, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.layer(x - x.mean(0, keepdim=True))


class Unsaved(nn.Module):
    """A network with a number that no checkpoint holds, another one in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.number = nn.Linear(120, 3), os.getpid()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)[:, :120]) + self.number


class Pairs(Task):
    """Two inputs by name, of which one has several lengths; the outputs are numbers."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def datasets(self) -> Datasets:
        samples = [(torch.rand(2, 2 + index % 3), float(index)) for index in range(9)]
        return Datasets(samples, samples)

    def collate(self, samples: list) -> tuple[list[Tensor], Tensor]:
        return [values for values, _ in samples], torch.tensor([target for _, target in samples])

    def export_inputs(self, data: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        longest = max(values.shape[1] for values in data[0])
        padded = [nn.functional.pad(values, (0, longest - values.shape[1])) for values in data[0]]
        return {"values": torch.stack(padded), "lengths": torch.tensor([values.shape[1] for values in data[0]])}

    def predict(self, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return model(data["values"].sum(2) / data["lengths"].unsqueeze(1)).squeeze(1)

    def loss(self, model: nn.Module, data: tuple[list[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        outputs = self.predict(model, self.export_inputs(data))
        return (outputs - data[1]) ** 2, outputs

    def metrics(self, outputs: Tensor, data: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        return {"error": (outputs - data[1]).abs()}


class ComplexPairs(Pairs):
    """An input of a type that Triton does not have."""

    def export_inputs(self, data: tuple[list[Tensor], Tensor]) -> dict[str, Tensor]:
        return {"values": super().export_inputs(data)["values"].to(torch.complex64)}

    def predict(self, model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        raise AssertionError("computed")
