"""The moving average of the weights: its arithmetic, and its path through step, evaluation, checkpoint and resume."""

import math
from contextlib import closing
from itertools import pairwise

import pytest
import torch

from distlenet.checkpoint.format import evaluation_weights, load_checkpoint
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.evaluate import evaluate
from distlenet.inference.predictor import Predictor
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer
from distlenet.training.weight_average import WeightAverage

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "device=cpu", "optim.lr=0.05", "train.max_steps=6", "checkpoint.every_steps=3")


class Poisoned(ImageClassification):
    """The third batch of the first epoch has a NaN."""

    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        if keys is not None and self.batches == 2:
            inputs[0] = math.nan
        self.batches += keys is not None and len(labels) > 1
        return inputs, labels

    batches = 0


def train(run_dir, *settings, task=ImageClassification, each_step=lambda _: None):
    """Train 6 steps; call ``each_step`` with the trainer after each. Return the trainer."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = load_config([], [*SETTINGS, *settings, f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"])

    class Watched(Trainer):
        def step(self, batch):
            result = super().step(batch)
            each_step(self)
            return result

    with (
        init_distributed(config) as context,
        closing(Watched(config, context, task(config), run_dir, Trackers(), Preemption(1.0))) as trainer,
    ):
        trainer.fit()
    return trainer


def test_average_is_that_of_every_step_from_the_initial_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].half()  # two values that differ by 1e-4 are the same in half precision
    average = WeightAverage(model, 0.75)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model[1].running_mean.add_(1)
        average.update()
        expected = {n: 0.75 * expected[n] + 0.25 * p.detach().double() for n, p in model.named_parameters()}
    state = average.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in expected.items():
        assert state[name].dtype == torch.float32
        torch.testing.assert_close(state[name].double(), value, rtol=1e-6, atol=1e-6)  # of float32, in 5 steps
    assert torch.equal(state["1.running_mean"], torch.full((4,), 5.0))  # as it is
    evaluated = average.evaluated_model()
    assert [p.dtype for p in evaluated.parameters()] == [p.dtype for p in model.parameters()]
    assert torch.equal(evaluated[0].weight, state["0.weight"].half())
    assert torch.equal(evaluated[1].running_mean, model[1].running_mean)
    assert not any(p.requires_grad for p in evaluated.parameters())


def test_shared_parameters_have_one_average_under_both_names():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    assert average.state_dict().keys() == {"0.weight", "1.weight"}
    start = average.state_dict()["1.weight"].clone()
    torch.nn.init.zeros_(model[0].weight)
    average.update()
    assert torch.equal(average.state_dict()["1.weight"], start / 2)
    other = WeightAverage(model, 0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.averages[0], start / 2)


def test_a_cache_that_a_forward_pass_has_replaced_is_evaluated_too():
    class Cached(torch.nn.Linear):
        def forward(self, x):
            self.mask = torch.ones(len(x), 1)
            return super().forward(x) * self.mask

    model = Cached(2, 2)
    model.register_buffer("mask", torch.ones(1, 1), persistent=False)
    average = WeightAverage(model, 0.5)
    model(torch.ones(3, 2))
    assert average.evaluated_model()(torch.ones(3, 2)).shape == (3, 2)


def test_the_average_is_evaluated_and_saved_and_the_weights_train_on(tmp_path):
    averaged = train(tmp_path / "averaged", "train.ema_decay=0.5")
    raw = train(tmp_path / "raw")
    for one, other in zip(averaged.model.parameters(), raw.model.parameters(), strict=True):
        assert torch.equal(one, other)
    path = find_checkpoint(tmp_path / "averaged")
    state = load_checkpoint(path)
    assert state["ema"].keys() == state["model"].keys()
    assert not torch.equal(state["ema"]["fc1.weight"], state["model"]["fc1.weight"])
    loss = evaluate(path)["test_loss"]
    assert loss == averaged.state.test["test_loss"]
    assert loss != raw.state.test["test_loss"]
    predictor = Predictor(path)
    assert torch.equal(predictor.trained.model.fc1.weight, state["ema"]["fc1.weight"])


def test_resumed_average_has_the_same_bits(tmp_path):
    changed = ("train.ema_decay=0.9", "optim.schedule=constant", "checkpoint.allow_changed=[train.max_steps]")
    whole = train(tmp_path / "whole", *changed)
    train(tmp_path / "run", *changed, "train.max_steps=4")
    resumed = train(tmp_path / "run", *changed)
    assert resumed.resumed_from is not None
    states = [trainer.train_step.on_device.weight_average.state_dict() for trainer in (whole, resumed)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_run_that_had_no_average_begins_one_with_the_loaded_weights(tmp_path):
    settings = ("optim.schedule=constant", "checkpoint.allow_changed=[train.max_steps,train.ema_decay]")
    before = train(tmp_path / "run", *settings, "train.max_steps=3").model.state_dict()
    averages = []
    train(
        tmp_path / "run",
        *settings,
        "train.max_steps=4",
        "train.ema_decay=0.75",
        each_step=lambda trainer: averages.append((trainer.train_step.on_device.weight_average.state_dict(), trainer)),
    )
    ((average, trainer),) = averages
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(average[name], 0.75 * before[name] + 0.25 * value)


def test_a_skipped_step_is_not_averaged(tmp_path):
    averages = []
    train(
        tmp_path / "run",
        "train.ema_decay=0.9",
        "train.on_nonfinite=skip",
        task=Poisoned,
        each_step=lambda t: averages.append(t.train_step.on_device.weight_average.averages[0].clone()),
    )
    same = [torch.equal(a, b) for a, b in pairwise(averages)]
    assert same == [False, True, False, False, False]


def test_average_of_another_structure_is_refused(tmp_path):
    trainer = train(tmp_path / "run", "train.ema_decay=0.9")
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))
    del state["ema"]["fc1.bias"]
    with pytest.raises(ValueError, match="ema is"):
        trainer.train_step.on_device.weight_average.load_state_dict(state["ema"])
    assert evaluation_weights({"model": {"a": 1}}) == {"model": {"a": 1}}
