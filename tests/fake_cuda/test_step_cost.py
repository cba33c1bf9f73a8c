"""Budgets of a step: nodes of its graph, launches outside of it, host syncs."""

import json
from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

PROGRAM = Path(__file__).parent / "step_cost_program.py"


def cost(*settings):
    printed = run(PROGRAM, *settings, "train.global_batch_size=64", "data.synthetic_train=4096").succeeded().stdout
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(("precision", "budget"), [("fp32", 18), ("bf16", 20)])
def test_a_replayed_step_is_little_more_than_the_bare_step(precision, budget):
    """Gather, label smoothing, all-reduce, metrics and flags: with the bare step, 60 and 85 nodes."""
    found = cost(f"precision={precision}")
    assert len(found["nodes"]) - found["bare nodes"] <= budget
    assert sum("ncclAllReduce" in name for name in found["nodes"]) == 1
    assert found["launches per step"] <= 1.25  # one copy of the inputs; every 64 steps, the values are added
    assert found["syncs per step"] == 0


@pytest.mark.parametrize(
    ("setting", "syncs"),
    [
        ("train.on_nonfinite=skip", 1),  # whether the step is taken
        ("precision=fp16", 2),  # that, by the scaler, and the next scale
    ],
)
def test_syncs_of_a_step_about_which_the_host_decides(setting, syncs):
    found = cost(setting, "optim.lr=0.01")
    assert found["nodes"] == []
    assert found["syncs per step"] == syncs
