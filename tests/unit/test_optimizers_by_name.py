"""Optimizers and schedules of torch or of the user's code, by ``module:attribute``."""

from contextlib import closing

import pytest
import torch
from torch.optim import NAdam
from torch.optim.lr_scheduler import LRScheduler

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.evaluate import evaluate
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.optimizers import (
    check_optimizer,
    check_optimizer_state,
    load_optimizer,
    make_optimizer,
)
from distlenet.training.schedules import make_schedule
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

HERE = "test_optimizers_by_name"


class Counting(torch.optim.SGD):
    """Keeps plain numbers: a count in its groups, and a list and None in its state, which begin with the third step."""

    def __init__(self, params, lr=0.1, scale=1.0):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(scale=scale, count=0)

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            if group["count"] > 2:
                self.state[group["params"][0]].update(seen=[group["count"]], nothing=None)
        super().step(closure)


class NotSavable(torch.optim.SGD):
    def step(self, closure=None):
        self.state[self.param_groups[0]["params"][0]]["function"] = object
        super().step(closure)


class NotSavableSchedule(torch.optim.lr_scheduler.ConstantLR):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.function = object


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("call optimizer.train() first")


def no_optimizer(params, lr):
    return 3


def layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def optim(*words):
    return load_config([], [f"optim.{word}" for word in words]).optim


def made(config, model):
    return make_optimizer(config, [{"params": list(model.parameters())}])


def steps(model, optimizer, schedule, count):
    rates = []
    for _ in range(count):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.zero_grad()
        (model(torch.ones(1, 3)) ** 2).sum().backward()
        optimizer.step()
        schedule.step()
    return rates


def test_named_optimizer_equals_torch_with_the_settings():
    config = optim("name=torch.optim:NAdam", "lr=0.01", "args.betas=[0.8,0.95]", "args.eps=1e-3", "weight_decay=0.1")
    model, reference = layer(), layer()
    steps(model, optimizer := made(config, model), make_schedule(optim("schedule=constant"), optimizer, 5), 5)
    expected = NAdam(reference.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    steps(reference, expected, make_schedule(optim("schedule=constant"), expected, 5), 5)
    assert torch.equal(model.weight, reference.weight)


def test_arguments_of_built_in_optimizers_and_an_optimizer_without_weight_decay():
    adamw = made(optim("name=adamw", "args.betas=[0.8,0.95]"), layer())
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)
    assert adamw.param_groups[0]["fused"]
    rprop = made(optim("name=torch.optim:Rprop", "weight_decay=0.1"), layer())
    assert "weight_decay" not in rprop.param_groups[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=torch.optim:LBFGS"], "optim.name=torch.optim:LBFGS: its step needs closure, which computes the loss"),
        (["name=torch.optim:NAdam", "args.beta=1"], r"optim.args: NAdam: got an unexpected .* accepts .*betas=\(0.9"),
        (["name=torch.optim:NAdam", "args.betas=[3,4]"], "NAdam: ValueError: Invalid beta .*; change optim.args"),
        (["name=torch.optim:NAdam", "args.lr=1"], "optim.args.lr: give optim.lr instead"),
        (["name=sgd", "args.momentum=0.5"], "optim.args.momentum: give optim.momentum instead"),
        (["name=torch.optim:SparseAdam"], "a trial step failed: RuntimeError: SparseAdam does not support dense"),
        (["name=torch.optim:Muon"], "Muon: ValueError: Muon only supports 2D"),
        ([f"name={HERE}:Failing"], r"a trial step failed: RuntimeError: call optimizer.train\(\) first"),
        ([f"name={HERE}:NotSavable"], "NotSavable: a checkpoint cannot hold its state"),
        ([f"name={HERE}:no_optimizer"], "returned a int; expected an Optimizer"),
    ],
)
def test_optimizers_that_do_not_fit(words, message):
    config = optim(*words)
    with pytest.raises(UserError, match=message):
        check_optimizer(config, made(config, layer()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["schedule=torch.optim.lr_scheduler:ReduceLROnPlateau"], "ReduceLROnPlateau: its step needs metrics, but a"),
        (["schedule=torch.optim.lr_scheduler:StepLR"], r"missing a required argument: 'step_size'; it accepts step_si"),
        (["schedule=torch.optim.lr_scheduler:OneCycleLR", "schedule_args.max_lr=1"], "ValueError: You must define"),
        (["schedule=torch.optim.lr_scheduler:StepLR", "schedule_args.step_size=2", "warmup_steps=3"], "warmup_steps=3"),
        (["schedule=cosine", "schedule_args.eta_min=0"], "optim.schedule_args: optim.schedule=cosine has none"),
        ([f"schedule={HERE}:NotSavableSchedule"], "NotSavableSchedule: a checkpoint cannot hold its state"),
        (["schedule=torch.nn:Linear", "schedule_args.out_features=3"], "TypeError|returned a Linear"),
    ],
)
def test_schedules_that_do_not_fit(words, message):
    optimizer = made(optim(), layer())
    with pytest.raises(UserError, match=message):
        make_schedule(optim(*words), optimizer, 10)


SCHEDULES = [
    ["schedule=torch.optim.lr_scheduler:StepLR", "schedule_args.step_size=3"],
    ["schedule=torch.optim.lr_scheduler:ExponentialLR", "schedule_args.gamma=0.9"],
    ["schedule=torch.optim.lr_scheduler:CosineAnnealingWarmRestarts", "schedule_args.T_0=4"],
    ["schedule=torch.optim.lr_scheduler:MultiStepLR", "schedule_args.milestones=[2,5]"],
    # Both of these also change the momentum of the groups.
    ["schedule=torch.optim.lr_scheduler:OneCycleLR", "schedule_args.max_lr=0.1", "schedule_args.total_steps=12"],
    ["schedule=torch.optim.lr_scheduler:CyclicLR", "schedule_args.base_lr=0.01", "schedule_args.max_lr=0.1"],
    ["schedule=cosine"],
]
OPTIMIZERS = ["torch.optim:NAdam", "torch.optim:Adagrad", "torch.optim:Rprop", f"{HERE}:Counting", "sgd"]


@pytest.mark.parametrize("words", SCHEDULES)
@pytest.mark.parametrize("name", ["torch.optim:NAdam", "sgd"])
@pytest.mark.parametrize("stop", [1, 7])
def test_schedules_resume_with_the_same_bits(words, name, stop):
    check_resume(optim(f"name={name}", "lr=0.05", *words), stop)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_optimizers_resume_with_the_same_bits(name, stop):
    check_resume(optim(f"name={name}", "lr=0.05", "schedule=cosine"), stop)


def check_resume(config, stop, total=12):
    model, resumed_model = layer(), layer()
    optimizer = made(config, model)
    schedule = make_schedule(config, optimizer, total)
    steps(model, optimizer, schedule, stop)
    # As a checkpoint keeps it: the tensors are copies.
    state = torch.utils._pytree.tree_map(
        lambda v: v.clone() if isinstance(v, torch.Tensor) else v,
        {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()},
    )
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    rates = steps(model, optimizer, schedule, total - stop)
    resumed_model.load_state_dict(weights)
    resumed = made(config, resumed_model)
    resumed_schedule = make_schedule(config, resumed, total)
    check_optimizer_state(config, resumed, False, state)
    load_optimizer(config, resumed, resumed_schedule, state)
    assert steps(resumed_model, resumed, resumed_schedule, total - stop) == rates
    assert torch.equal(resumed_model.weight, model.weight)
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (optimizer, resumed)]
    assert groups[0] == groups[1]
    assert schedule.state_dict() == resumed_schedule.state_dict()


def test_changed_arguments_are_those_of_the_run_and_what_is_no_argument_is_state():
    old, new = (optim(f"name={HERE}:Counting", "schedule=constant", f"args.scale={scale}") for scale in (1.0, 2.0))
    model = layer()
    optimizer = made(old, model)
    schedule = make_schedule(old, optimizer, 9)
    steps(model, optimizer, schedule, 4)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    resumed = made(new, model)
    load_optimizer(new, resumed, make_schedule(new, resumed, 9), state)
    assert resumed.param_groups[0]["scale"] == 2.0
    assert resumed.param_groups[0]["count"] == 4


def test_settings_of_a_schedule_by_name_cannot_change():
    words = ["optim.schedule=torch.optim.lr_scheduler:StepLR", "checkpoint.allow_changed=[train.epochs,optim.lr]"]
    with pytest.raises(UserError, match=r"optim\.lr cannot change: it is part of the state of optim.schedule=torch"):
        load_config([], words)
    load_config([], words[1:])


def test_state_of_another_shape_is_refused():
    config, model = optim("name=torch.optim:NAdam", "schedule=constant"), layer()
    optimizer = made(config, model)
    schedule = make_schedule(config, optimizer, 9)
    steps(model, optimizer, schedule, 1)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"optimizer\.state\.0\.exp_avg is a tensor"):
        check_optimizer_state(config, optimizer, False, state)
    state["optimizer"]["state"] = 3
    with pytest.raises(ValueError, match=r"optimizer\.state is 3"):
        check_optimizer_state(config, optimizer, False, state)


def test_a_run_with_both_by_name(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    words = ("data.name=digits", "device=cpu", "train.max_steps=5", "optim.name=torch.optim:NAdam", "optim.lr=0.01")
    words += ("optim.schedule=torch.optim.lr_scheduler:StepLR", "optim.schedule_args.step_size=2")
    words += ("optim.schedule_args.gamma=0.5", "optim.momentum=0")
    config = load_config([], [*words, f"run.dir={tmp_path}"])
    with (
        init_distributed(config) as context,
        closing(
            Trainer(config, context, ImageClassification(config), tmp_path, Trackers(), Preemption(1.0))
        ) as trainer,
    ):
        trainer.fit()
    assert trainer.state.lr == 0.0025  # of the fifth step
    assert isinstance(trainer.train_step.on_device.optimizer, NAdam)
    assert isinstance(trainer.train_step.schedule, LRScheduler)
    found = evaluate(tmp_path)  # it does not train: neither optimizer nor schedule has to be named again
    assert found["test_loss"] == trainer.state.test["test_loss"]
