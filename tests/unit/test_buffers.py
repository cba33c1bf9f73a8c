"""Buffers: every micro-batch computes with those from before the step, and the average change is applied once."""

import copy
import math
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.preemption import Preemption
from distlenet.reduction.buffers import BufferAverage, persistent_buffers, unchanged_buffers
from distlenet.reduction.ddp import DdpReducer
from distlenet.reduction.exact import ExactReducer
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.step_flags import StepFlags
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

ONE_RANK = DistributedEnvironment()


class Counting(nn.Module):
    """Adds the mean of its input to ``seen``; ``total`` is replaced; ``mask`` never changes; ``cache`` is not state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("mask", torch.full((1000,), -math.inf))
        self.register_buffer("calls", torch.tensor(2**40))
        self.register_buffer("late", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.write_late = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean() + self.seen
        self.total = self.total + x.sum() * self.weight.sum()
        self.calls += 1
        self.cache = torch.zeros(7)
        if self.write_late:
            self.late += 1
        return x * self.weight


def make_ddp(model: nn.Module, accumulation_steps: int, size: int) -> DdpReducer:
    return DdpReducer(model, ONE_RANK, accumulation_steps, size, dist.all_reduce, False, False, False)


def make_reducer(kind: str, model: nn.Module):
    if kind == "ddp":
        return make_ddp(model, accumulation_steps=3, size=2)
    return ExactReducer(model, ONE_RANK, virtual_shards=4, micro_batch_size=2, check_finite=True)


def take_step(reducer, data: Tensor, apply: bool = True, fail_at: int = -1):
    with reducer.step(len(data), torch.tensor(0.0)) as step:
        for number, micro_batch in enumerate(step.micro_batches(data)):
            loss = reducer.model(micro_batch.data).sum()
            if number == fail_at:
                raise ArithmeticError
            step.backward(loss)
    if apply:
        reducer.buffers.apply(step.result.buffer_change)
    reducer.model.zero_grad()
    return step.result


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["ddp", "exact"])
def test_changes_are_averaged_by_samples_and_applied_once(kind):
    model = Counting()
    tensors = {name: buffer for name, buffer in model.named_buffers() if name != "cache"}
    reducer = make_reducer(kind, model)
    data = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0])  # micro-batches of 2, 2 and 1, or shards of 2, 1, 1 and 1
    seen = total = 0.0
    for number in range(1, 4):
        before = copy.deepcopy(model.state_dict())
        take_step(reducer, data, apply=False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        sizes = [(2, [1, 2]), (2, [3, 4]), (1, [10])] if kind == "ddp" else [(2, [1, 10]), (1, [2]), (1, [3]), (1, [4])]
        total += sum(n * sum(part) for n, part in sizes) / 5
        seen += 4.0 + seen  # the mean of the data, plus its own value from before the step
        take_step(reducer, data)
        assert float(model.seen) == pytest.approx(seen, rel=1e-6)
        assert float(model.total) == pytest.approx(total, rel=1e-6)
        assert int(model.calls) == 2**40 + number
        assert model.mask.eq(-math.inf).all()
        assert all(getattr(model, name) is tensor for name, tensor in tensors.items())
    assert reducer.buffers.sums.shape == (1 if kind == "ddp" else 4, 3)  # not the mask


@pytest.mark.usefixtures("group")
def test_buffer_that_changes_later_is_refused():
    model = Counting()
    reducer = make_reducer("ddp", model)
    take_step(reducer, torch.ones(4))
    model.write_late = True
    with pytest.raises(UserError, match="buffer late: changes now, but did not in the first step"):
        take_step(reducer, torch.ones(4))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["ddp", "exact"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_reset_undoes_the_changes_of_an_unfinished_step(kind, steps_before):
    model = Counting()
    reducer = make_reducer(kind, model)
    for _ in range(steps_before):
        take_step(reducer, torch.ones(4))
    before = copy.deepcopy(model.state_dict())

    def example_loss(wrapped):
        return wrapped(torch.ones(1)).sum()

    reducer.warm_up(example_loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ArithmeticError):
        take_step(reducer, torch.ones(4), fail_at=1)
    model.zero_grad()
    reducer.reset(example_loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    take_step(reducer, torch.ones(4))


@pytest.mark.usefixtures("group")
def test_one_micro_batch_equals_plain_batchnorm_to_the_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None))
    plain = copy.deepcopy(model)
    reducer = make_ddp(model, accumulation_steps=1, size=8)
    for _ in range(5):
        images = torch.randn(8, 1, 6, 6) * 3 + 1
        take_step(reducer, images)
        plain(images)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def average_change(changes: dict[int, float], rows: int, all_reduce) -> float:
    """Return the average of one step whose micro-batches, by row, change a float64 buffer from 0."""
    model = nn.Module()
    model.register_buffer("value", torch.zeros(1, dtype=torch.float64))
    average = BufferAverage(model, rows, all_reduce)
    average.begin()
    for row, change in changes.items():
        model.value.fill_(change)
        average.add(min(row, rows - 1), 1)
    return average.reduce(1).item()


@pytest.mark.parametrize(("rows", "equal"), [(4, True), (1, False)])
def test_rows_make_the_sum_independent_of_ranks(rows, equal):
    """With one row, the order of additions matters: 2**-53 is lost when it is added to 1, but not 2 × 2**-53."""
    changes = dict(enumerate([1.0, 2.0**-53, 2.0**-53, 2.0**-53]))
    one_rank = average_change(changes, rows, lambda _: None)
    sent: list[Tensor] = []
    average_change({row: changes[row] for row in (1, 3)}, rows, lambda values: sent.append(values.clone()))
    two_ranks = average_change({row: changes[row] for row in (0, 2)}, rows, lambda values: values.add_(sent.pop(0)))
    assert sent == []
    assert (one_rank == two_ranks) == equal


@pytest.mark.usefixtures("group")
def test_model_without_changing_buffers_sends_nothing():
    calls = []
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.ones(3))
    average = BufferAverage(model, 1, calls.append)
    for _ in range(3):
        average.begin()
        average.add(0, 4)
        assert average.reduce(4) is None
    assert len(calls) == 1  # in the first step
    assert BufferAverage(nn.Linear(1, 1), 1, calls.append).reduce(4) is None
    assert len(calls) == 1


def test_unchanged_buffers():
    model = Counting()
    assert [buffer.name for buffer in persistent_buffers(model)] == ["seen", "total", "mask", "calls", "late"]
    before = dict(model.named_buffers())
    with unchanged_buffers(model):
        model(torch.ones(2))
        assert float(model.seen) == 1.0
    assert all(getattr(model, name) is before[name] for name in ("seen", "total", "calls"))
    assert (float(model.seen), float(model.total), int(model.calls)) == (0.0, 0.0, 2**40)


POISONED = 77


class BatchNormTask(ImageClassification):
    poisoned = POISONED

    def model(self) -> nn.Module:
        layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(4, 10))

    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        if keys is not None:
            inputs[keys.indices == self.poisoned] = math.inf
        return inputs, labels


SETTINGS = ("data.name=digits", "train.global_batch_size=64", "train.epochs=1", "device=cpu", "optim.lr=0.05")


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
@pytest.mark.parametrize("deferred", [False, True])
def test_step_that_is_not_taken_leaves_the_buffers(tmp_path, reduction, deferred):
    """Also not the diagnosis, which computes the step again."""
    words = [*SETTINGS, f"distributed.reduction={reduction}", "train.log_every=7"]
    words += [] if deferred else ["train.on_nonfinite=skip"]
    config = load_config([], words)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with init_distributed(config) as context:
        task = BatchNormTask(config)
        trainer = Trainer(config, context, task, tmp_path / "run", Trackers(), Preemption(1.0))
        with closing(trainer):
            step = trainer.train_step.on_device
            if deferred:  # as on a GPU
                step.flags = StepFlags(step.optimizer, context.device, loss_scaling=False)
            number = next(k for k, indices in enumerate(trainer.sampler.batches(epoch=0)) if POISONED in indices)
            trainer.start()
            for batch in trainer.loader.epoch(0, stop=number + 2):
                before = copy.deepcopy(trainer.model.state_dict())
                trainer.step(batch)
                changed = not torch.equal(before["1.running_mean"], trainer.model.state_dict()["1.running_mean"])
                assert changed == (batch.number != number and not (deferred and batch.number > number))
            if deferred:
                before = copy.deepcopy(trainer.model.state_dict())
                with pytest.raises(UserError, match=f"step {number + 1}: the loss of rank 0 is not finite"):
                    trainer.check_finite()
                for name, value in before.items():
                    assert torch.equal(value, trainer.model.state_dict()[name]), name
            assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_skipped_step_of_loss_scaling_leaves_the_buffers(tmp_path):
    """With fp16, the scaler decides; here a stand-in for it, which halves its scale instead of taking a step."""
    config = load_config([], SETTINGS)
    (tmp_path / "run/checkpoints").mkdir(parents=True)

    class Scaler:
        overflow, value = False, 8.0

        def is_enabled(self):
            return True

        def get_scale(self):
            return self.value

        def scale(self, loss):
            return loss

        def step(self, optimizer):
            if not self.overflow:
                optimizer.step()

        def update(self):
            self.value /= 1 + self.overflow

        def unscale_(self, optimizer):
            pass

    class Clean(BatchNormTask):
        poisoned = -1

    with init_distributed(config) as context:
        trainer = Trainer(config, context, Clean(config), tmp_path / "run", Trackers(), Preemption(1.0))
        with closing(trainer):
            trainer.start()
            scaler = trainer.train_step.on_device.scaler = Scaler()
            for batch in trainer.loader.epoch(0, stop=4):
                scaler.overflow = batch.number == 2
                before = trainer.model.state_dict()["1.running_mean"].clone()
                trainer.step(batch)
                after = trainer.model.state_dict()["1.running_mean"]
                assert torch.equal(before, after) == scaler.overflow
