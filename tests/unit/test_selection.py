"""Which values select the best checkpoint and end a run early."""

import pytest

from distlenet.config.loading import load_config
from distlenet.training.meter import Metrics
from distlenet.training.selection import Best, Selection
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def selection(*settings, has_validation=True):
    return Selection(load_config([], settings), has_validation)


def follow(selected, name, values):
    """Evaluate once per value; return after which evaluations the best was replaced, and when the run stopped."""
    best, replaced = {}, []
    for step, value in enumerate(values, start=1):
        best = selected.update(best, Metrics({"loss": 1.0, "error": 1.0, name: value}, 10), step)
        if selected.is_best(best):
            replaced.append(step)
        if selected.stops(best):
            return replaced, step
    return replaced, None


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loss", [3.0, 2.0, 2.0, 1.0, NAN], [1, 2, 4]),  # an equal value is no improvement
        ("top_5_error", [0.5, 0.25], [1, 2]),
        ("accuracy", [0.5, 0.5, 0.75, 0.7], [1, 3]),
        ("auc", [NAN, -1.0, NAN, 0.0], [2, 4]),
    ],
)
def test_losses_and_errors_are_minimised_and_all_others_maximised(name, values, expected):
    assert follow(selection(f"checkpoint.best_by=val/{name}"), name, values) == (expected, None)


def test_by_default_the_loss_selects():
    assert selection().best_by == "val/loss"
    assert not selection().stops({"val/loss": Best(0.5, 1, 100)})


def test_a_run_stops_after_patience_evaluations_without_an_improvement():
    selected = selection("train.stop_when=val/accuracy", "train.stop_patience=2")
    assert follow(selected, "accuracy", [0.5, 0.4, 0.6, 0.6, 0.5, 0.9])[1] == 5
    assert follow(selected, "accuracy", [NAN, NAN])[1] == 2


def test_without_a_validation_set_nothing_is_selected():
    selected = selection(has_validation=False)
    assert (selected.best_by, list(selected.names)) == (None, [])
    assert not selected.is_best({})
    assert not selected.stops({})


@pytest.mark.parametrize("key", ["train.stop_when", "checkpoint.best_by"])
def test_settings_that_need_a_validation_set(key):
    with pytest.raises(UserError, match=f"{key}=val/loss: the data has no validation set; give data.validation=0.1"):
        selection(f"{key}=val/loss", has_validation=False)
    with pytest.raises(UserError, match=f"{key}=test/loss: expected val/NAME"):
        selection(f"{key}=test/loss")
    with pytest.raises(
        UserError, match=f"{key}=val/f1: the task has no such metric; give one of val/loss, val/accuracy"
    ):
        selection(f"{key}=val/f1").check_names(["accuracy"])
