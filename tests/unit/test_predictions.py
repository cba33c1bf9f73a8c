"""Metrics over all predictions of a set: what a task may return, on one rank."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from loaders import make_evaluation_loader
from torch import nn

from distlenet.config.schema import Config
from distlenet.task import Datasets, Task
from distlenet.training.evaluation import evaluate
from distlenet.training.outline import outline_of
from distlenet.training.predictions import Predictions
from distlenet.utils.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group")]

CPU = torch.device("cpu")
CONTEXT = SimpleNamespace(device=CPU, autocast=nullcontext)


class Scoring(Task):
    """The outputs are the samples; tests replace the methods below."""

    def model(self):
        return nn.Identity()

    def datasets(self):
        return Datasets([0.0], [0.0])

    def loss(self, model, data):
        return model(data), data

    def metrics(self, outputs, data):
        return {"sample": outputs}

    def prediction(self, outputs, data):
        return {"score": outputs, "ragged": [[value] * int(value) for value in outputs.tolist()]}

    def summary_metrics(self, predictions):
        self.seen = predictions
        return {"median": predictions["score"].median(), "most": max(map(len, predictions["ragged"]))}


def run(**methods):
    task = type("Mine", (Scoring,), methods)(Config())
    model = task.model()
    outline = outline_of(task, model, torch.ones(1), nullcontext())
    loader = make_evaluation_loader([3.0, 0.0, 2.0, 7.0, 1.0], 2)
    return task, evaluate(outline, model, loader, 5, CONTEXT)


def test_summary_metrics_get_all_predictions_in_order():
    task, metrics = run()
    assert metrics.means == {"loss": 2.6, "sample": 2.6, "median": 2.0, "most": 7.0}
    assert task.seen["score"].tolist() == [3.0, 0.0, 2.0, 7.0, 1.0]
    assert [len(item) for item in task.seen["ragged"]] == [3, 0, 2, 7, 1]


def test_without_predictions_nothing_is_kept():
    _, metrics = run(prediction=Task.prediction, summary_metrics=Task.summary_metrics)
    assert list(metrics.means) == ["loss", "sample"]


def test_a_prediction_that_is_a_part_of_a_larger_tensor_is_kept_alone():
    task = Scoring(Config())
    task.prediction = lambda outputs, _: {"score": outputs}
    predictions = Predictions(task, ())
    predictions.update(torch.ones(2, 1000)[:, 5], None, torch.arange(2))
    assert predictions.chunks[0][1]["score"].untyped_storage().nbytes() == 2 * 4


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"prediction": Task.prediction}, r"Mine.summary_metrics: needs Mine.prediction, which returns None"),
        ({"prediction": lambda *_: {"a": torch.ones(())}}, r"Mine.prediction: a: expected a tensor \(n, ...\)"),
        ({"prediction": lambda *_: {"a": torch.ones(2)}}, r"Mine.prediction: a: .* got a tensor of shape \(2,\)"),
        ({"prediction": lambda *_: {"a": (1,)}}, r"Mine.prediction: a: .* got a tuple"),
        (
            {"prediction": lambda *_: {"a": torch.ones(1)}},
            r"Mine.prediction: a: expected one item for each of 2 samples",
        ),
        ({"prediction": lambda *_: torch.ones(1)}, r"Mine.prediction: returned a tensor of shape \(1,\) .* a dict"),
        ({"summary_metrics": lambda *_: torch.ones(())}, r"Mine.summary_metrics: returned a tensor .* expected a dict"),
        ({"summary_metrics": lambda *_: None}, "Mine.summary_metrics: returned a NoneType; expected a dict"),
        ({"summary_metrics": lambda *_: {"sample": 1.0}}, "Mine.summary_metrics: sample: this name is taken"),
        ({"summary_metrics": lambda *_: {"loss": 1.0}}, "Mine.summary_metrics: loss: this name is taken"),
        (
            {"summary_metrics": lambda *_: {"a": torch.ones(2)}},
            "Mine.summary_metrics: a: expected a number, but got a Tensor",
        ),
        ({"summary_metrics": lambda *_: {"a": None}}, "Mine.summary_metrics: a: expected a number, but got a NoneType"),
        ({"metrics": lambda *_: {"lr": torch.ones(1)}}, "Mine.metrics: lr: this name is taken"),
    ],
)
def test_a_task_that_breaks_the_contract(methods, message):
    with pytest.raises(UserError, match=message):
        run(**methods)
