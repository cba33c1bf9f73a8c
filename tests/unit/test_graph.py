"""A step that is recorded and replayed. Recording itself needs a GPU (tests/ranks/test_cuda.py): here one stands in
that keeps what a CUDA graph keeps, which Python values and which memory the step was recorded with."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.data.sources import load_data
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tracking.base import Trackers
from distlenet.training.cuda_graph import WARM_UP, GraphedStep
from distlenet.training.trainer import Trainer

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "train.global_batch_size=64", "data.augment=flip_shift", "train.epochs=2", "device=cpu")


def train(folder, settings, record=None):
    """Train two epochs of 23 steps, the last of 29 images, and return the trainer and how often ``record`` replayed."""
    config = load_config([], [*SETTINGS, *settings, f"run.dir={folder}", "checkpoint.resume=never"])
    replays, resets = [], []

    def replaying(work):
        replay = record(work)
        return SimpleNamespace(replay=lambda: (replays.append(1), replay()), reset=lambda: resets.append(1))

    with init_distributed(config) as context:
        trainer = Trainer(config, context, load_data(config.data), folder, Trackers([]), Preemption(1.0))
        (folder / "checkpoints").mkdir(parents=True)
        step = trainer.take_step
        if record:
            step.graph = GraphedStep(step.optimizer, 64, context.device, replaying)
        else:
            compute = step.compute
            step.compute = lambda *batch: with_float32_lr(step, compute, batch)
        trainer.fit()
        trainer.checkpointer.close()
        for _ in range(2):
            trainer.take_step.close()
        assert len(resets) == min(1, len(replays))  # before the process group ends
    return trainer, len(replays)


def with_float32_lr(step, compute, batch):
    (group,) = step.optimizer.param_groups
    lr = group["lr"]
    group["lr"] = float(torch.tensor(lr))
    compute(*batch)
    group["lr"] = lr


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replayed_steps_are_the_steps(tmp_path, reduction, optimizer):
    """Shuffled batches, two epochs' augmentation and a learning rate that changes reach the recorded step."""
    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=1", f"optim.name={optimizer}")
    settings += ("optim.lr=0.01",)
    plain, _ = train(tmp_path / "plain", settings)
    replayed, replays = train(tmp_path / "replayed", settings, record=lambda work: work)
    assert replays == 2 * 22 - WARM_UP  # the last batch of an epoch is short
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, replayed.net.state_dict()[name]), name
    assert plain.at.test == replayed.at.test


def test_a_step_that_cannot_be_recorded_runs_as_it_is(tmp_path, capsys):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    plain, _ = train(tmp_path / "plain", ())
    refused, _ = train(tmp_path / "refused", (), record=refuse)
    warning = "the step cannot be recorded on every rank, so it runs as it is: operation not permitted when stream is"
    assert capsys.readouterr().err.count(warning) == 1
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, refused.net.state_dict()[name]), name


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("place", ["conv2.weight", "fc1.bias"])
def test_a_recording_that_breaks_off_in_backward_leaves_nothing_behind(tmp_path, capsys, reduction, place):
    """DistributedDataParallel would wait for the rest of that backward, and refuse the next forward."""

    def break_off(work):
        def fail(_):
            raise RuntimeError("cannot be recorded")

        parameter = dict(inspect.getclosurevars(work).nonlocals["of"].net.named_parameters())[place]
        hook = parameter.register_hook(fail)
        try:
            work()
        finally:
            hook.remove()

    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=1")
    plain, _ = train(tmp_path / "plain", settings)
    refused, replays = train(tmp_path / "refused", settings, record=break_off)
    assert "so it runs as it is: cannot be recorded" in capsys.readouterr().err
    assert replays == 0
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, refused.net.state_dict()[name]), name


def test_settings_are_the_schedules_again_after_a_step(tmp_path):
    trainer, _ = train(tmp_path / "run", ("optim.name=adamw", "optim.lr=0.01"), record=lambda work: work)
    (group,) = trainer.take_step.optimizer.param_groups
    assert isinstance(group["lr"], float)
    assert group["capturable"] is False


def test_asked_for_without_a_gpu_says_so(tmp_path, capsys):
    config = load_config([], [*SETTINGS, f"run.dir={tmp_path}", "train.cuda_graph=auto", "train.max_steps=1"])
    with init_distributed(config) as context:
        trainer = Trainer(config, context, load_data(config.data), tmp_path, Trackers([]), Preemption(1.0))
        (tmp_path / "checkpoints").mkdir()
        trainer.fit()
        trainer.checkpointer.close()
    assert "train.cuda_graph=auto: no graph, since there is no GPU" in capsys.readouterr().err


def test_ranks_that_differ_have_no_graph_all_alike(monkeypatch, tmp_path, capsys):
    """Three shards on two ranks: one has two micro-batches, the other one alone could have a graph."""
    words = ("distributed.reduction=exact", "distributed.virtual_shards=1", "train.cuda_graph=auto")
    config = load_config([], [*SETTINGS, *words, f"run.dir={tmp_path}"])
    with init_distributed(config) as context:
        trainer = Trainer(config, context, load_data(config.data), tmp_path, Trackers([]), Preemption(1.0))
        step = trainer.take_step
        monkeypatch.setattr(step, "why_no_graph", lambda: None)
        step.settle(trainer.feed.no_images)
        assert step.graph is not None
        step.graph = None
        monkeypatch.setattr("distlenet.training.train_step.any_rank", lambda *_: True)  # so says another rank
        step.settle(trainer.feed.no_images)
        assert step.graph is None
    assert "no graph, since another rank cannot have one" in capsys.readouterr().err
