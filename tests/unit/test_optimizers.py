import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from distlenet.config.loading import load_config
from distlenet.training.optimizers import load_optimizer, make_optimizer
from distlenet.training.schedules import lr_factor, make_schedule

pytestmark = pytest.mark.unit

STEPS = 40


def one_group(model):
    return [{"params": list(model.parameters())}]


def step_through(schedule, optimizer, steps=STEPS):
    """Return the learning rate of each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def learning_rates(*overrides: str):
    config = load_config([], ["optim.lr=0.5", *overrides]).optim
    optimizer = make_optimizer(config, one_group(torch.nn.Linear(1, 1)))
    return step_through(make_schedule(config, optimizer, STEPS), optimizer)


def test_one_cycle_equals_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    # torch rises over 0.3 × 40 - 1 = 11 steps, so that step 11 is the peak.
    reference = OneCycleLR(optimizer, 0.5, total_steps=STEPS, pct_start=0.3, cycle_momentum=False)
    rates = learning_rates("optim.schedule=one_cycle", "optim.warmup_steps=11")
    assert rates == pytest.approx(step_through(reference, optimizer), rel=1e-12)  # the same formula in float64


def test_cosine_equals_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = step_through(CosineAnnealingLR(optimizer, STEPS), optimizer)
    assert learning_rates("optim.schedule=cosine") == pytest.approx(reference, rel=1e-9, abs=1e-12)  # a recursion


def test_cosine_after_warm_up_and_constant():
    rates = learning_rates("optim.schedule=cosine", "optim.warmup_steps=4")
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[22] == pytest.approx(0.25)  # half of 36 steps after the warm-up
    assert learning_rates("optim.schedule=constant") == [0.5] * STEPS
    assert learning_rates("optim.schedule=constant", "optim.warmup_steps=2")[:3] == [0.25, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_short_runs_and_long_warm_ups_have_finite_rates(schedule, total):
    for warmup in (0, 1, total, total + 5):
        for step in range(total + 1):
            assert 0 <= lr_factor(schedule, warmup, total, step) <= 1
            assert math.isfinite(lr_factor(schedule, warmup, total, step))


def test_one_cycle_rises_for_three_tenths_by_default():
    assert max(range(STEPS), key=learning_rates().__getitem__) == 12


@pytest.mark.parametrize(
    ("overrides", "reference"),
    [
        (
            ["optim.name=sgd", "optim.momentum=0.8", "optim.weight_decay=0.01"],
            lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.01),
        ),
        (
            ["optim.name=sgd", "optim.momentum=0", "optim.nesterov=false", "optim.weight_decay=0"],
            lambda p: torch.optim.SGD(p, lr=0.5),
        ),
        (["optim.name=adamw", "optim.weight_decay=0.1"], lambda p: torch.optim.AdamW(p, lr=0.5, weight_decay=0.1)),
    ],
)
def test_optimizers_equal_torch_with_the_given_settings(overrides, reference):
    config = load_config([], ["optim.lr=0.5", *overrides]).optim
    models = []
    for make in (lambda model: make_optimizer(config, one_group(model)), lambda model: reference(model.parameters())):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(1, 3)) ** 2).sum().backward()
            optimizer.step()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Fused and plain kernels round in another order: a few ulps (6e-8) in each of 3 steps of growing values.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_resuming_uses_the_state_of_the_checkpoint_and_the_settings_of_the_run():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    old = load_config([], ["optim.lr=0.5", "optim.schedule=cosine"]).optim
    optimizer = make_optimizer(old, one_group(layer))
    schedule = make_schedule(old, optimizer, STEPS)
    layer(torch.ones(1, 3)).sum().backward()
    step_through(schedule, optimizer, 20)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    new = load_config([], ["optim.lr=0.1", "optim.schedule=cosine", "optim.momentum=0.5"]).optim
    resumed = make_optimizer(new, one_group(layer))
    resumed_schedule = make_schedule(new, resumed, STEPS)
    load_optimizer(new, resumed, resumed_schedule, state)
    (group,) = resumed.param_groups
    assert group["momentum"] == 0.5
    assert group["lr"] == pytest.approx(0.05)  # half way down a cosine from 0.1
    assert step_through(resumed_schedule, resumed, 2)[1] < 0.05
    buffers = [resumed.state[p]["momentum_buffer"] for p in layer.parameters()]
    assert all(bool(b.abs().sum() > 0) for b in buffers)


def test_resumed_schedule_continues():
    config = load_config([], ["optim.lr=0.5"]).optim
    optimizer = make_optimizer(config, one_group(torch.nn.Linear(1, 1)))
    schedule = make_schedule(config, optimizer, STEPS)
    step_through(schedule, optimizer, 17)
    resumed = make_optimizer(config, one_group(torch.nn.Linear(1, 1)))
    resumed_schedule = make_schedule(config, resumed, STEPS)
    load_optimizer(
        config, resumed, resumed_schedule, {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    )
    assert step_through(resumed_schedule, resumed, 10) == step_through(schedule, optimizer, 10)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_optimizer_runs_one_kernel_per_parameter(name):
    """Which torch does with fused=False alone, as loss scaling needs it for SGD."""
    config = load_config([], [f"optim.name={name}"]).optim
    for loss_scaling in (False, True):
        optimizer = make_optimizer(config, one_group(torch.nn.Linear(1, 1)), loss_scaling)
        (group,) = optimizer.param_groups
        fused = name == "adamw" or not loss_scaling
        assert (group["fused"], bool(group["foreach"])) == (fused, not fused)
