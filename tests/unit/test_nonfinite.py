"""A step with a non-finite loss or gradient: kept from the weights, explained in a file, stopped or skipped."""

import json
import math
from contextlib import closing

import pytest
import torch
from torch import nn

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Tracker
from distlenet.training.step_flags import StepFlags
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "train.global_batch_size=64", "train.epochs=1", "device=cpu", "optim.lr=0.05")
POISONED = 77
"""The sample whose inputs are NaN in training."""


class PoisonedTask(ImageClassification):
    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        if keys is not None:
            inputs[keys.indices == POISONED] = math.nan
        return inputs, labels


class BatchNorm(PoisonedTask):
    """The loss of each sample of the poisoned batch is NaN."""

    def model(self):
        return nn.Sequential(nn.BatchNorm2d(1), super().model())


class Masked(ImageClassification):
    """Each sample has a mask with -inf; the loss of one is NaN."""

    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        mask = torch.full((len(labels), 2), -math.inf)
        return inputs, labels, mask, torch.zeros(len(labels)) if keys is None else keys.indices == POISONED

    def loss(self, model, data):
        losses, logits = super().loss(model, data[:2])
        return torch.where(data[3] > 0, math.nan, losses), logits


class AllPoisoned(ImageClassification):
    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        return inputs if keys is None else inputs * math.nan, labels


class InfiniteGradient(ImageClassification):
    def model(self):
        model = super().model()
        model.fc3.bias.register_hook(lambda gradient: gradient * math.inf)
        return model


class FrozenLayer(PoisonedTask):
    def model(self):
        model = super().model()
        model.conv1.requires_grad_(requires_grad=False)
        return model


class Weighted(ImageClassification):
    """The weights of the poisoned sample's batch are 0; the weight of the sample, ``weight``."""

    weight = 0.0

    def transform(self, data, keys):
        images, labels = super().transform(data, keys)
        weights = torch.ones(len(labels))
        if keys is not None and (keys.indices == POISONED).any():
            weights = torch.where(keys.indices == POISONED, self.weight, 0.0)
        return images, labels, weights

    def loss(self, model, data):
        losses, logits = super().loss(model, data[:2])
        return (losses, data[2]), logits


class NegativeWeight(Weighted):
    weight = -1.0


class Recorder(Tracker):
    def __init__(self):
        self.records = []

    def log(self, record):
        self.records.append(record)


def make(run_dir, context, config, task=PoisonedTask, deferred=False):
    (run_dir / "checkpoints").mkdir(parents=True)
    trainer = Trainer(config, context, task(config), run_dir, Recorder(), Preemption(1.0))
    if deferred:  # as on a GPU
        step = trainer.train_step.on_device
        step.flags = StepFlags(step.optimizer, context.device, loss_scaling=False)
    return closing(trainer)


def poisoned_step(trainer) -> int:
    return next(number for number, indices in enumerate(trainer.sampler.batches(epoch=0)) if POISONED in indices)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("deferred", [False, True])
def test_run_stops_with_the_weights_from_before(tmp_path, optimizer, reduction, deferred):
    words = [*SETTINGS, f"distributed.reduction={reduction}", f"optim.name={optimizer}", "train.log_every=7"]
    words.append("optim.schedule=constant")
    config = load_config([], words)
    with init_distributed(config) as context, make(tmp_path / "bad", context, config, deferred=deferred) as bad:
        number = poisoned_step(bad)
        assert 0 < number < 20  # there are steps before it, and a check after it
        with pytest.raises(UserError, match=rf"step {number + 1}: the loss of rank 0 is not finite.*on_nonfinite=skip"):
            bad.fit()
        config = load_config([], [*words, f"train.max_steps={number}"])
        with make(tmp_path / "good", context, config, ImageClassification) as good:
            good.fit()
    assert all(p.isfinite().all() for p in bad.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(bad.model.parameters(), good.model.parameters(), strict=True))
    (path,) = (tmp_path / "bad/diagnosis").iterdir()
    report = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert report["step"] == number + 1
    assert report["not_finite"] == []
    (rank,) = report["ranks"]
    assert rank["worst"][0] == {"index": POISONED, "loss": "nan"}
    assert isinstance(rank["worst"][1]["loss"], float)
    assert len(rank["indices"]) == 64
    assert rank["not_finite_data"] == [POISONED]
    assert rank["gradients"][0]["not_finite"] > 0
    assert not list((tmp_path / "bad/checkpoints").iterdir())


@pytest.mark.parametrize(
    ("task", "samples"),
    [
        (BatchNorm, f"sample {POISONED};"),
        (Masked, f"sample {POISONED};"),
        (AllPoisoned, r"samples (\d+, ){9}\d+ and of 54 others;"),
    ],
)
def test_samples_whose_input_is_not_finite_are_named(tmp_path, task, samples):
    config = load_config([], [*SETTINGS])
    message = (
        rf"the loss of rank 0 is not finite \(on .*\), nor is the input of {samples} see .*; correct these samples"
    )
    with init_distributed(config) as context, make(tmp_path / "run", context, config, task) as trainer:  # noqa: SIM117
        with pytest.raises(UserError, match=message):
            trainer.fit()


@pytest.mark.parametrize("task", [PoisonedTask, FrozenLayer])
@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_step_can_be_skipped(tmp_path, capsys, reduction, task):
    words = (f"distributed.reduction={reduction}", "train.on_nonfinite=skip", "train.log_every=1")
    config = load_config([], [*SETTINGS, *words])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, task) as trainer:
        number = poisoned_step(trainer)
        summary = trainer.fit()
    assert summary["skipped_steps"] == 1
    assert math.isfinite(summary["test_loss"])
    records = [record for record in trainer.tracker.records if record["split"] == "train"]
    assert records[number]["count"] == 0
    assert [record.get("skipped_steps") for record in records] == [None] * number + [1] * (len(records) - number)
    assert records[number + 1]["lr"] == records[number]["lr"]  # the schedule waits too
    (epoch,) = [record for record in trainer.tracker.records if record["split"] == "train_epoch"]
    assert epoch["count"] == 1437 - 64
    warnings = capsys.readouterr().err
    assert f"step {number + 1}: the loss of rank 0 is not finite" in warnings
    assert "skipped (train.on_nonfinite=skip), 1 of at most 10" in warnings


def test_skipping_has_a_limit(tmp_path):
    words = ("train.on_nonfinite=skip", "train.max_skipped_steps=2", "train.epochs=9")
    config = load_config([], [*SETTINGS, *words])
    message = r"2 steps were skipped before \(train\.max_skipped_steps\)"
    with init_distributed(config) as context, make(tmp_path / "run", context, config) as trainer:  # noqa: SIM117
        with pytest.raises(UserError, match=message):
            trainer.fit()
    assert trainer.state.epoch == 2
    assert len(list((tmp_path / "run/diagnosis").iterdir())) == 3


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize(
    ("task", "cause"),
    [(Weighted, "the weights of all losses are 0"), (NegativeWeight, "a weight of rank 0 is negative or not finite")],
)
def test_weights_without_a_mean_are_reported(tmp_path, reduction, task, cause):
    config = load_config([], [*SETTINGS, f"distributed.reduction={reduction}"])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, task) as trainer:
        number = poisoned_step(trainer)
        with pytest.raises(UserError, match=f"step {number + 1}: {cause}; see"):
            trainer.fit()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_excessive_learning_rate_is_reported(tmp_path):
    config = load_config([], [*SETTINGS, "optim.lr=1e8", "optim.schedule=constant"])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, ImageClassification) as trainer:  # noqa: SIM117
        with pytest.raises(UserError, match=r"step \d+: the loss of rank 0 is not finite .*give a smaller optim\.lr"):
            trainer.fit()


@pytest.mark.parametrize(("reduction", "log_every"), [("ddp", 1), ("exact", 50)])
def test_finite_loss_with_an_infinite_gradient_is_found(tmp_path, reduction, log_every):
    """In every step with exact, and with ddp in the steps whose gradient norm is computed."""
    words = (f"distributed.reduction={reduction}", f"train.log_every={log_every}")
    config = load_config([], [*SETTINGS, *words])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, InfiniteGradient) as trainer:
        initial = [p.clone() for p in trainer.model.parameters()]
        with pytest.raises(UserError, match=r"step 1: the gradient of fc3\.bias is not finite; see .*step-00000001"):
            trainer.fit()
        assert all(torch.equal(a, b) for a, b in zip(initial, trainer.model.parameters(), strict=True))


def test_gradient_beyond_the_bound_of_exact_sums_is_reported(tmp_path):
    config = load_config([], [*SETTINGS, "distributed.reduction=exact"])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, ImageClassification) as trainer:
        trainer.reducer.to_bound *= 2.0**12  # as if the bound were that much lower
        with pytest.raises(
            UserError, match=r"step 1: the loss is finite, but the sum of the gradients was not, or too"
        ):
            trainer.fit()


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = load_config([], [*SETTINGS])
    with init_distributed(config) as context, make(tmp_path / "run", context, config, ImageClassification) as trainer:
        trainer.state_dict()
        with torch.no_grad():
            trainer.model.conv2.weight[3, 1, 0, 0] = float("inf")
            trainer.model.fc3.bias[2] = float("nan")
            trainer.model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0)))
            trainer.model.register_parameter("rotation", torch.nn.Parameter(torch.full((2,), 1 - 1j * float("inf"))))
        with pytest.raises(
            UserError, match=r"rotation, conv2\.weight, fc3\.bias: no longer finite; give a smaller optim\.lr"
        ):
            trainer.state_dict()


def test_diagnosis_that_cannot_be_written_only_warns(tmp_path, capsys):
    config = load_config([], [*SETTINGS])
    with init_distributed(config) as context, make(tmp_path / "run", context, config) as trainer:
        (tmp_path / "run/diagnosis").write_text("in the way")
        with pytest.raises(UserError, match="the loss of rank 0 is not finite"):
            trainer.fit()
    assert "run/diagnosis/step-" in capsys.readouterr().err
