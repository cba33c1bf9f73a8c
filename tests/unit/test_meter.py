import functools
import operator

import pytest
import torch

from distlenet.training.meter import Meter
from distlenet.utils.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("group")]

CPU = torch.device("cpu")


def make_meter():
    return Meter(["accuracy"], CPU)


def update(meter, losses, correct):
    meter.update(torch.tensor([losses, correct], dtype=torch.float32))


def test_means_are_over_samples_not_over_batches():
    meter = make_meter()
    update(meter, [1.0, 1.0, 1.0], [1, 1, 0])
    update(meter, [9.0], [0])  # a short last batch with a large loss: the mean of the batches' means is 5
    metrics = meter.total()
    assert metrics.means == {"loss": 3.0, "accuracy": 0.5}
    assert metrics.count == 4
    assert metrics.to_dict("test_") == {"test_loss": 3.0, "test_accuracy": 0.5, "test_count": 4}


def test_window_covers_what_was_added_since_the_last_one():
    meter = make_meter()
    update(meter, [1.0], [1])
    assert meter.window().means["loss"] == 1.0
    update(meter, [5.0], [0])
    window = meter.window()
    assert (window.means, window.count) == ({"loss": 5.0, "accuracy": 0.0}, 1)
    assert (meter.window().count, meter.total().count, meter.total().count) == (0, 2, 2)
    meter.reset()
    assert (meter.total().count, meter.window().count) == (0, 0)


def test_empty_batches_count_nothing():
    meter = make_meter()
    update(meter, [], [])
    assert meter.total().to_dict() == {"loss": 0.0, "accuracy": 0.0, "count": 0}


def test_saved_meter_resumes():
    meter = make_meter()
    update(meter, [2.0], [1])
    meter.window()
    update(meter, [4.0], [1])
    resumed, other_rank = make_meter(), make_meter()
    resumed.load_state_dict(meter.state_dict(), rank=0)
    other_rank.load_state_dict(meter.state_dict(), rank=1)
    assert resumed.window().means["loss"] == 4.0
    assert resumed.total().means["loss"] == 3.0
    assert other_rank.total().count == 0  # only rank 0 holds the sums, or they would count twice


def test_sums_of_losses_do_not_depend_on_their_order():
    """Losses from 1e-6 to 1e6: plain float64 sums of them differ from order to order."""
    generator = torch.Generator().manual_seed(0)
    losses = 10 ** (torch.rand(500, generator=generator) * 12 - 6)
    sums, plain = set(), set()
    for _ in range(5):
        order = torch.randperm(500, generator=generator)
        meter = Meter([], CPU)
        for part in losses[order].split(7):
            meter.update(part.unsqueeze(0))
        sums.add(meter.total().means["loss"])
        plain.add(functools.reduce(operator.add, losses[order].tolist()))  # sum() compensates since Python 3.12
    assert len(sums) == 1
    assert len(plain) > 1


def test_weighted_loss_is_the_mean_by_weight_and_metrics_stay_means_over_samples():
    meter = Meter(["accuracy"], CPU, weighted=True)
    meter.update(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match="the weights of all 2 samples are 0"):
        meter.total()
    meter.reset()
    assert meter.total().to_dict() == {"loss": 0.0, "accuracy": 0.0, "count": 0}
    meter.update(torch.tensor([[6.0, 1.0], [1.0, 0.0], [2.0, 0.5]]))  # losses 3 and 2, weights 2 and 0.5
    assert meter.total().to_dict() == {"loss": 7 / 2.5, "accuracy": 0.5, "count": 2}
