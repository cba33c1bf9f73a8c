from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from loaders import make_evaluation_loader
from torch import nn

from distlenet.config.schema import Config
from distlenet.task import Datasets, Task
from distlenet.training.evaluation import evaluate
from distlenet.training.outline import TaskOutline

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group")]

CPU = torch.device("cpu")
CONTEXT = SimpleNamespace(device=CPU, autocast=nullcontext)


class Numbers:
    """A dataset of numbers."""

    def __init__(self, *values):
        self.values = torch.tensor(values)

    def __len__(self):
        return len(self.values)

    def get_batch(self, indices):
        return self.values[indices]


class Halving(nn.Module):
    """Return half of each number, and record in which mode it was called."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, numbers):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return numbers / 2


class HalvingTask(Task):
    """The loss is the output; the metric is whether it is above 1."""

    def model(self):
        return Halving()

    def datasets(self):
        return Datasets(Numbers(0), Numbers(0))

    def transform(self, data, keys):
        assert keys is None
        return data + 1.0

    def loss(self, model, data):
        outputs = model(data)
        return outputs, outputs

    def metrics(self, outputs, data):
        assert data.dtype == torch.float32  # transformed
        return {"large": outputs > 1}


OUTLINE = TaskOutline(HalvingTask(Config()), ("large",))


class Recorder:
    """An analysis that keeps its input."""

    def __init__(self):
        self.rows = []

    def update(self, outputs, data, indices):
        self.rows += zip(indices.tolist(), data.tolist(), outputs.tolist(), strict=True)


def load(dataset):
    return make_evaluation_loader(dataset, 4)


def test_evaluation_counts_each_sample_once():
    dataset, model, recorder = Numbers(0, 1, 2, 3, 9), Halving(), Recorder()
    metrics = evaluate(OUTLINE, model, load(dataset), len(dataset), CONTEXT, recorder)
    assert metrics.means == {"loss": pytest.approx(2.0), "large": pytest.approx(3 / 5)}
    assert metrics.count == 5
    assert recorder.rows == [(0, 1.0, 0.5), (1, 2.0, 1.0), (2, 3.0, 1.5), (3, 4.0, 2.0), (4, 10.0, 5.0)]
    assert model.modes == [(False, False)] * 2  # two batches, in evaluation mode and without gradients
    assert model.training


def test_evaluation_fails_if_samples_are_missing():
    with pytest.raises(RuntimeError, match="counted 5 samples of a set of 6"):
        evaluate(OUTLINE, Halving(), load(Numbers(0, 1, 2, 3, 9)), 6, CONTEXT)


def test_interrupted_evaluation_returns_to_training_mode():
    def interrupt():
        yield from load(Numbers(0))
        raise KeyboardInterrupt

    model = Halving()
    with pytest.raises(KeyboardInterrupt):
        evaluate(OUTLINE, model, interrupt(), 1, CONTEXT)
    assert model.training
