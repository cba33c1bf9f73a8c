"""A step that is not finite: kept from the weights, explained in a file, and the end of the run, or skipped."""

import json
import math

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.data.transforms import Prepare
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tracking.base import Trackers
from distlenet.training.nonfinite_guard import Guard
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "train.global_batch_size=64", "train.epochs=1", "device=cpu", "optim.lr=0.05")
POISONED = 77
"""The sample that spoils every step it is in."""


class Poisoned(Prepare):
    def augmented(self, images, indices, epoch):
        inputs = super().augmented(images, indices, epoch)
        inputs[indices == POISONED] = math.nan
        return inputs


class Kept:
    """Keeps the records."""

    def __init__(self):
        self.records = []

    def log(self, record):
        self.records.append(record)

    def start(self, facts): ...

    def sync(self): ...

    def close(self): ...


def make(folder, context, config, poisoned=True, lag=False):
    kept = Kept()
    trainer = Trainer(config, context, load_data(config.data), folder, Trackers([kept]), Preemption(1.0))
    (folder / "checkpoints").mkdir(parents=True)
    step = trainer.take_step
    if poisoned:
        step.prepare.__class__ = Poisoned
    if lag:  # as on a GPU
        step.guard = Guard(step.optimizer, context.device, lag=True, loss_scaling=False)
    trainer.kept = kept.records
    return trainer


def poisoned_step(trainer) -> int:
    trainer.feed.sampler.set_position(0, 0)
    return next(number for number, indices in enumerate(trainer.feed.sampler) if POISONED in indices)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("lag", [False, True])
def test_the_run_stops_with_the_weights_from_before(tmp_path, optimizer, reduction, lag):
    words = [*SETTINGS, f"distributed.reduction={reduction}", f"optim.name={optimizer}", "train.log_every=7"]
    config = load_config([], words)
    with init_distributed(config) as context:
        bad = make(tmp_path / "bad", context, config, lag=lag)
        number = poisoned_step(bad)
        assert 0 < number < 20  # there is something before, and a look after it
        with pytest.raises(UserError, match=rf"step {number + 1}: the loss of rank 0 is not finite.*on_nonfinite=skip"):
            bad.fit()
        config = load_config([], [*words, f"train.max_steps={number}", "optim.schedule=constant"])
        good = make(tmp_path / "good", context, config, poisoned=False)
        constant = make(tmp_path / "constant", context, load_config([], [*words, "optim.schedule=constant"]), lag=lag)
        good.fit()
        with pytest.raises(UserError):
            constant.fit()
        for trainer in (good, bad, constant):
            trainer.checkpointer.close()
    assert all(p.isfinite().all() for p in bad.net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(constant.net.parameters(), good.net.parameters(), strict=True))
    (path,) = (tmp_path / "bad/diagnosis").iterdir()
    report = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report["step"] == number + 1
    assert report["not_finite"] == []
    (rank,) = report["ranks"]
    assert rank["worst"][0]["index"] == POISONED
    assert rank["worst"][0]["loss"] == "nan"
    assert isinstance(rank["worst"][1]["loss"], float)
    assert len(rank["indices"]) == 64
    assert rank["gradients"][0]["not_finite"] > 0
    assert not list((tmp_path / "bad/checkpoints").iterdir())


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_a_run_may_skip_the_step(tmp_path, capsys, reduction):
    words = (f"distributed.reduction={reduction}", "train.on_nonfinite=skip", "train.log_every=1")
    config = load_config([], [*SETTINGS, *words])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config)
        number = poisoned_step(trainer)
        summary = trainer.fit()
        trainer.checkpointer.close()
    assert summary["skipped_steps"] == 1
    assert math.isfinite(summary["test_loss"])
    records = [record for record in trainer.kept if record["split"] == "train"]
    assert records[number]["count"] == 0
    assert records[number + 1]["lr"] == records[number]["lr"]  # the schedule waits, too
    (epoch,) = [record for record in trainer.kept if record["split"] == "train_epoch"]
    assert epoch["count"] == 1437 - 64
    told = capsys.readouterr().err
    assert f"step {number + 1}: the loss of rank 0 is not finite" in told
    assert "skipped (train.on_nonfinite=skip), 1 of at most 10" in told


def test_skipping_has_an_end(tmp_path):
    words = ("train.on_nonfinite=skip", "train.max_skipped_steps=2", "train.epochs=9")
    config = load_config([], [*SETTINGS, *words])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config)
        with pytest.raises(UserError, match=r"2 steps were skipped before \(train\.max_skipped_steps\)"):
            trainer.fit()
        trainer.checkpointer.close()
    assert trainer.at.epoch == 2
    assert len(list((tmp_path / "run/diagnosis").iterdir())) == 3


def test_a_learning_rate_beyond_reason_is_told(tmp_path):
    config = load_config([], [*SETTINGS, "optim.lr=1e8", "optim.schedule=constant"])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config, poisoned=False)
        with pytest.raises(UserError, match=r"step \d+: the loss of rank 0 is not finite .*give a smaller optim\.lr"):
            trainer.fit()
        trainer.checkpointer.close()


def test_a_gradient_beyond_the_exact_sums_bound_is_told(tmp_path):
    config = load_config([], [*SETTINGS, "distributed.reduction=exact"])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config, poisoned=False)
        trainer.reduction.to_bound *= 2.0**12  # as if the bound were that much lower
        with pytest.raises(
            UserError, match=r"step 1: the loss is finite, but the sum of the gradients was not, or too"
        ):
            trainer.fit()
        trainer.checkpointer.close()


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    config = load_config([], [*SETTINGS])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config, poisoned=False)
        trainer.state_dict()
        with torch.no_grad():
            trainer.net.conv2.weight[3, 1, 0, 0] = float("inf")
            trainer.net.fc3.bias[2] = float("nan")
        with pytest.raises(UserError, match=r"conv2\.weight, fc3\.bias: not finite any more; give a smaller optim\.lr"):
            trainer.state_dict()


def test_a_diagnosis_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    config = load_config([], [*SETTINGS])
    with init_distributed(config) as context:
        trainer = make(tmp_path / "run", context, config)
        (tmp_path / "run/diagnosis").write_text("in the way")
        with pytest.raises(UserError, match="the loss of rank 0 is not finite"):
            trainer.fit()
        trainer.checkpointer.close()
    assert "run/diagnosis/step-" in capsys.readouterr().err
