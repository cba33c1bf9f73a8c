"""A task that breaks its contract is found with one sample, before the first step."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from distlenet.config.schema import Config
from distlenet.task import Datasets, Task
from distlenet.training.outline import outline_of
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


class Doubling(Task):
    """The loss is twice the sample; tests replace ``loss`` and ``metrics``."""

    def model(self):
        return nn.Identity()

    def datasets(self):
        return Datasets([0.0], [0.0])

    def loss(self, model, data):
        return 2 * model(data), data

    def metrics(self, outputs, data):
        return {"sample": outputs}


def outline(**methods):
    task = type("Mine", (Doubling,), methods)(Config())
    model = task.model().train()
    result = outline_of(task, model, torch.ones(1), nullcontext())
    assert model.training
    return result


def test_values_are_those_of_the_task_in_order():
    values = outline().values(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]), None)
    assert values.tolist() == [[2.0, 4.0], [1.0, 2.0]]
    assert outline().metric_names == ("sample",)
    assert outline(metrics=Task.metrics).metric_names == ()


@pytest.mark.parametrize(
    ("losses", "described"),
    [
        (torch.tensor(1.0), r"a tensor of shape \(\) and type float32; return the losses without averaging them"),
        (torch.ones(1, 3), r"a tensor of shape \(1, 3\) and type float32"),
        (torch.ones(1, dtype=torch.int64), r"a tensor of shape \(1,\) and type int64"),
        (1.0, "a float"),
    ],
)
def test_losses_are_one_number_per_sample(losses, described):
    with pytest.raises(UserError, match=rf"^Mine\.loss: expected one floating-point loss per sample.*{described}"):
        outline(loss=lambda *_: (losses, None))


@pytest.mark.parametrize(
    ("name", "values"), [("loss", torch.ones(1)), ("f1", torch.tensor(0.5)), ("f1", 0.5), ("count", torch.ones(1))]
)
def test_metrics_are_one_value_per_sample(name, values):
    with pytest.raises(UserError, match=rf"^Mine\.metrics: {name}: expected one value per sample"):
        outline(metrics=lambda *_: {name: values})
