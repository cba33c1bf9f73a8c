"""A step that is captured and replayed.

Capturing needs a GPU (tests/ranks/test_cuda.py). Here a stand-in keeps what a CUDA graph keeps: the Python values and
the memory with which the step was captured.
"""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.cuda_graph import WARM_UP_STEPS, GraphedStep
from distlenet.training.device_step import DeviceStep
from distlenet.training.trainer import Trainer

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "train.global_batch_size=64", "data.augment=flip_shift", "train.epochs=2", "device=cpu")


class Float32LearningRate(DeviceStep):
    """Rounds the learning rate to float32, as a graph does."""

    def compute(self, batch, step, want_grad_norm):
        (group,) = self.optimizer.param_groups
        lr = group["lr"]
        group["lr"] = float(torch.tensor(lr))
        result = super().compute(batch, step, want_grad_norm)
        group["lr"] = lr
        return result


def make_trainer(config, context, run_dir):
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    task = ImageClassification(config)
    return Trainer(config, context, task, run_dir, Trackers(), Preemption(1.0))


def train(run_dir, settings, capture=None):
    """Train two epochs of 23 steps, the last of 29 images; return the trainer and the number of replays."""
    config = load_config([], [*SETTINGS, *settings, f"run.dir={run_dir}", "checkpoint.resume=never"])
    replays, resets = [], []

    def capture_and_count(work):
        replay = capture(work)
        return SimpleNamespace(replay=lambda: (replays.append(1), replay()), reset=lambda: resets.append(1))

    with init_distributed(config) as context, closing(make_trainer(config, context, run_dir)) as trainer:
        step = trainer.train_step
        if capture:
            step.graph = GraphedStep(step.on_device, 64, micro_batch=0, capture=capture_and_count)
        else:
            step.on_device.__class__ = Float32LearningRate
        trainer.fit()
        trainer.close()
        trainer.close()
        assert len(resets) == min(1, len(replays))  # before the process group ends
    return trainer, len(replays)


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replayed_steps_equal_eager_steps(tmp_path, reduction, optimizer):
    """Shuffled batches, the augmentation of two epochs and a changing learning rate reach the captured step."""
    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=1", f"optim.name={optimizer}")
    settings += ("optim.lr=0.01",)
    eager, _ = train(tmp_path / "eager", settings)
    replayed, replays = train(tmp_path / "replayed", settings, capture=lambda work: work)
    assert replays == 2 * 22 - WARM_UP_STEPS  # the last batch of an epoch is short
    assert_same_weights(eager, replayed)
    assert eager.state.test == replayed.state.test


def test_step_that_cannot_be_captured_runs_eagerly(tmp_path, capsys):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    eager, _ = train(tmp_path / "eager", ())
    refused, _ = train(tmp_path / "refused", (), capture=refuse)
    warning = "the step cannot be captured on every rank, so it runs eagerly: operation not permitted when stream is"
    assert capsys.readouterr().err.count(warning) == 1
    assert_same_weights(eager, refused)


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("parameter", ["conv2.weight", "fc1.bias"])
def test_capture_that_fails_in_backward_leaves_no_trace(tmp_path, capsys, reduction, parameter, monkeypatch):
    """DistributedDataParallel would wait for the rest of that backward pass, and refuse the next forward pass."""
    models, make_model = [], ImageClassification.model
    monkeypatch.setattr(ImageClassification, "model", lambda self: models.append(make_model(self)) or models[-1])

    def fail(_):
        raise RuntimeError("cannot be captured")

    def capture(work):
        hook = dict(models[-1].named_parameters())[parameter].register_hook(fail)
        try:
            work()
        finally:
            hook.remove()

    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=1")
    eager, _ = train(tmp_path / "eager", settings)
    refused, replays = train(tmp_path / "refused", settings, capture=capture)
    assert "so it runs eagerly: cannot be captured" in capsys.readouterr().err
    assert replays == 0
    assert_same_weights(eager, refused)


def test_optimizer_settings_are_the_schedules_again_after_a_step(tmp_path):
    trainer, _ = train(tmp_path / "run", ("optim.name=adamw", "optim.lr=0.01"), capture=lambda work: work)
    (group,) = trainer.train_step.on_device.optimizer.param_groups
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False


def test_graph_without_a_gpu_is_a_warning(tmp_path, capsys):
    config = load_config([], [*SETTINGS, f"run.dir={tmp_path}", "train.cuda_graph=auto", "train.max_steps=1"])
    with init_distributed(config) as context, closing(make_trainer(config, context, tmp_path)) as trainer:
        trainer.fit()
    assert "train.cuda_graph=auto: no graph, because there is no GPU" in capsys.readouterr().err


def test_all_ranks_have_a_graph_or_none(monkeypatch, tmp_path, capsys):
    """Three shards on two ranks: one has two micro-batches, only the other one could have a graph."""
    words = ("distributed.reduction=exact", "distributed.virtual_shards=1", "train.cuda_graph=auto")
    config = load_config([], [*SETTINGS, *words, f"run.dir={tmp_path}"])
    with init_distributed(config) as context, closing(make_trainer(config, context, tmp_path)) as trainer:
        step = trainer.train_step
        monkeypatch.setattr(step, "_why_no_graph", lambda: None)
        step.warm_up()
        assert step.graph is not None
        step.graph = None
        monkeypatch.setattr("distlenet.training.train_step.any_rank", lambda *_: True)  # as another rank reports
        step.warm_up()
        assert step.graph is None
    assert "no graph, because another rank cannot have one" in capsys.readouterr().err
