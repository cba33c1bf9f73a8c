import json
import math

import pytest

from distlenet.training.meter import Metrics
from distlenet.training.selection import Best
from distlenet.training.state import TrainState

pytestmark = pytest.mark.unit

METRICS = {"val": Metrics({"loss": 0.75}, 40), "test": Metrics({"loss": 0.5, "accuracy": 0.9}, 360)}
TESTED = TrainState(step=7, epoch=1, batch=3, micro_batch=16, run_id="a1b2c3d4").with_evaluation(
    METRICS, {"val/loss": Best(0.75, 7), "val/auc": Best(-math.inf, 0, 1)}
)


def test_saved_state_equals_the_original():
    saved = json.loads(json.dumps(TESTED.state_dict()))
    assert TrainState.from_state_dict(saved) == TESTED
    assert TrainState.from_state_dict(TrainState().state_dict()) == TrainState()


def test_evaluation_keeps_the_metrics_of_each_split():
    assert TESTED.evaluated == 7
    assert TESTED.val == {"val_loss": 0.75, "val_count": 40}
    assert TESTED.test == {"test_loss": 0.5, "test_accuracy": 0.9, "test_count": 360}
    assert TrainState(step=3).with_evaluation({"test": METRICS["test"]}, {}).val == {}


def test_state_of_a_version_without_validation_sets_is_read():
    saved = {**TrainState(step=4).state_dict(), "best_accuracy": 0.9}
    del saved["val"], saved["best"]
    assert TrainState.from_state_dict(saved) == TrainState(step=4)


def test_progress_over_steps_and_epochs():
    state = TrainState().advance(lr=0.5, skipped=False).advance(lr=0.25, skipped=True)
    assert state == TrainState(step=2, batch=2, lr=0.25, skipped=1)
    assert state.next_epoch() == TrainState(step=2, epoch=1, lr=0.25, skipped=1)


@pytest.mark.parametrize("missing", TrainState().state_dict())
def test_missing_value_is_refused(missing):
    saved = {name: value for name, value in TESTED.state_dict().items() if name != missing}
    with pytest.raises(KeyError, match=missing):
        TrainState.from_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("step", True),
        ("epoch", 1.5),
        ("lr", "0.1"),
        ("test", {"test_loss": "0.5"}),
        ("test", ["test_loss"]),
        ("val", {"val_loss": None}),
        ("best", ["val/loss"]),
        ("best", {"val/loss": 0.5}),
        ("best", {"val/loss": {"value": 0.5, "step": -1, "stale": 0}}),
        ("started_from", 3),
        ("run_id", "../../../etc"),
    ],
)
def test_invalid_value_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        TrainState.from_state_dict({**TESTED.state_dict(), name: value})
