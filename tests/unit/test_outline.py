"""A task that breaks its contract is found with one sample, before the first step."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from distlenet.config.schema import Config
from distlenet.task import Datasets, Task
from distlenet.training.outline import SampleLosses, TaskOutline, outline_of
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
    values = outline().values(SampleLosses(torch.tensor([2.0, 4.0]), None, torch.tensor([1.0, 2.0])), None)
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
    ("returned", "described"),
    [(torch.ones(1), r"a tensor of shape \(1,\)"), ((1, 2, 3), "a tuple"), (None, "a NoneType")],
)
def test_loss_returns_losses_and_outputs(returned, described):
    with pytest.raises(UserError, match=rf"^Mine\.loss: returned {described}.*; expected two values: the losses"):
        outline(loss=lambda *_: returned)
    with pytest.raises(UserError, match=rf"^Mine\.metrics: returned {described}.*; expected a dict"):
        outline(metrics=lambda *_: returned)


@pytest.mark.parametrize(("name", "values"), [("f1", torch.tensor(0.5)), ("f1", 0.5)])
def test_metrics_are_one_value_per_sample(name, values):
    with pytest.raises(UserError, match=rf"^Mine\.metrics: {name}: expected one value per sample"):
        outline(metrics=lambda *_: {name: values})


def test_single_value_per_channel_is_explained():
    task = type("Mine", (Doubling,), {"model": lambda _: nn.BatchNorm1d(3)})(Config())
    with pytest.raises(UserError, match=r"^a micro-batch of 1 has no batch statistics: .*; give data\.drop_last=true"):
        TaskOutline(task, ()).loss(task.model().train(), torch.ones(1, 3))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        TaskOutline(task, ()).loss(task.model().train(), torch.ones(1, 3, 1, 1))


def weighted(weights):
    """Return the methods of a task with losses 3 and 5."""
    n = len(weights)
    return {"loss": lambda *_: ((torch.tensor([3.0, 5.0])[:n], weights), torch.tensor([1.0, 2.0])[:n])}


def weighted_task(weights):
    return type("Mine", (Doubling,), weighted(weights))(Config())


def test_weights_are_found_and_multiply_the_losses():
    found = outline(**weighted(torch.tensor([7.0])))
    assert found.weighted
    assert found.weight_unit == 8.0  # a power of two near 7
    found = TaskOutline(weighted_task(torch.tensor([2.0, 0.5])), ("sample",), 8.0)
    result = found.loss(nn.Identity(), None)
    assert [float(total) for total in found.sums(result)] == [(2 * 3 + 0.5 * 5) / 8, 2.5 / 8]
    assert found.values(result, None).tolist() == [[6.0, 2.5], [1.0, 2.0], [2.0, 0.5]]
    assert found.join([], torch.device("cpu")).shape == (3, 0)
    assert not outline().weighted
    assert outline().join([], torch.device("cpu")).shape == (2, 0)
    assert outline(**weighted(torch.tensor([0.0]))).weight_unit == 1.0


def test_weights_are_rounded_so_that_their_sums_are_exact_and_a_negative_one_is_not_finite():
    task = weighted_task(torch.tensor([1 / 3, -1.0], requires_grad=True))
    weights = TaskOutline(task, (), 1.0).loss(nn.Identity(), None).weights
    assert not weights.requires_grad
    assert weights[0] == round(2**20 / 3) / 2**20
    assert weights[1].isnan()


@pytest.mark.parametrize(
    ("weights", "described"),
    [
        (torch.tensor(1.0), r"one floating-point weight per sample.* a tensor of shape \(\)"),
        (torch.tensor([1]), "one floating-point weight per sample.* and type int64"),
        (torch.tensor([-1.0]), "weights of 0, or from 0.001 on, but got -1;"),
        (torch.tensor([1e-5]), "weights of 0.* got 1e-05; only their ratios matter"),
        (torch.tensor([float("nan")]), "weights of 0.* got nan"),
    ],
)
def test_weights_are_one_number_per_sample(weights, described):
    with pytest.raises(UserError, match=rf"^Mine\.loss: expected {described}"):
        outline(loss=lambda *_: ((torch.ones(1), weights), torch.ones(1)))
