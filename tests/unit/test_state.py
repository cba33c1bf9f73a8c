import json

import pytest

from distlenet.training.meter import Metrics
from distlenet.training.state import TrainState

pytestmark = pytest.mark.unit

TESTED = TrainState(step=7, epoch=1, batch=3, micro_batch=16, run_id="a1b2c3d4").with_test(
    Metrics({"loss": 0.5, "accuracy": 0.9}, 360)
)


def test_saved_state_equals_the_original():
    saved = json.loads(json.dumps(TESTED.state_dict()))
    assert TrainState.from_state_dict(saved) == TESTED
    assert TrainState.from_state_dict(TrainState().state_dict()) == TrainState()


def test_evaluation_keeps_the_best_accuracy():
    assert (TESTED.evaluated, TESTED.best_accuracy) == (7, 0.9)
    worse = TESTED.with_test(Metrics({"loss": 0.4, "accuracy": 0.8}, 360))
    assert worse.test == {"test_loss": 0.4, "test_accuracy": 0.8, "test_count": 360}
    assert worse.best_accuracy == 0.9


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
        ("started_from", 3),
        ("run_id", "../../../etc"),
    ],
)
def test_invalid_value_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        TrainState.from_state_dict({**TESTED.state_dict(), name: value})
