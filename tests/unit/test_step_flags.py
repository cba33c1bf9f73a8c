"""The inputs, flags and values of steps that the host does not wait for. The GPU's events: tests/fake_cuda."""

import math

import pytest
import torch

from distlenet.training.meter import DeferredMeter, Meter
from distlenet.training.step_flags import DELAY, StepFlags
from distlenet.training.step_inputs import RECENT_STEPS, StepInputs

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def make_flags():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    return StepFlags(optimizer, CPU, loss_scaling=False), StepInputs(CPU, 1, 0), optimizer, weight


def take_steps(flags, inputs, values, start=0):
    """Record the flags ``values`` of steps; return what each poll returned."""
    stops = []
    for step, value in enumerate(values, start):
        inputs.set(step, 0, False, [0.5], None)
        flags.record(torch.tensor(value), inputs.slot)
        stops.append(flags.poll(step))
    return stops


@pytest.mark.parametrize("start", [0, 61])
def test_stop_request_is_returned_after_a_delay_and_kept(start):
    flags, inputs, _, _ = make_flags()
    values = [0.0, 0.0, 0.25, *[0.0] * 70]
    assert take_steps(flags, inputs, values, start) == [False] * (2 + DELAY) + [True] * (71 - DELAY)
    assert flags.first_bad_step() is None


def test_first_bad_step_is_found_and_it_and_later_ones_leave_the_weights():
    flags, inputs, optimizer, weight = make_flags()
    for step, value in enumerate([0.0, math.nan, 0.0, math.nan]):
        take_steps(flags, inputs, [value], 100 + step)
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == 0.5  # one step
    assert flags.first_bad_step() == 101


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("first_step", [0, 50])
def test_stored_values_have_the_sums_of_added_ones(first_step):
    """Over more steps than are stored, of several sizes, with reads in between."""
    generator = torch.Generator().manual_seed(0)
    plain, deferred = Meter(["accuracy"], CPU), DeferredMeter(["accuracy"], CPU, False, max_samples=5)
    inputs = StepInputs(CPU, 0, 0)
    for step in range(first_step, first_step + 2 * RECENT_STEPS + 7):
        values = torch.rand(2, 3 if step % 10 == 9 else 5, generator=generator)
        inputs.set(step, 0, False, [], None)
        for meter in (plain, deferred):
            meter.update(values, inputs.slot)
            meter.count(step, values.shape[1])
        if step % 30 == 0:
            assert deferred.window() == plain.window()
    assert deferred.total() == plain.total()
    assert deferred.total().count == plain.total().count > 0
    deferred.reset()
    assert deferred.total().count == 0


def test_inputs_of_a_step_are_those_that_were_set():
    inputs = StepInputs(CPU, groups=2, samples=4)
    inputs.set(step=67, epoch=3, stop=True, lrs=[0.1, 1e-30], indices=torch.tensor([5, 2**40, 7]))
    assert inputs.slot.tolist() == [67 % RECENT_STEPS]
    assert [float(inputs.epoch), float(inputs.stop)] == [3, 1]
    assert [float(lr) for lr in inputs.lrs] == torch.tensor([0.1, 1e-30]).tolist()
    keys = inputs.keys(seed=9, samples=3)
    assert (keys.seed, keys.indices.tolist()) == (9, [5, 2**40, 7])
    inputs.set(step=68, epoch=0, stop=False, lrs=[1.0, 1.0], indices=None)
    assert float(inputs.stop) == 0
