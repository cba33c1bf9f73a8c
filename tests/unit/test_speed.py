import pytest
import torch

from distlenet.tracking.base import NONDETERMINISTIC_KEYS
from distlenet.training.meter import Metrics
from distlenet.training.throughput import Throughput, summarise

pytestmark = pytest.mark.unit


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("distlenet.training.throughput.time.perf_counter", lambda: self.now)


@pytest.mark.usefixtures("group")
def test_times_are_told_apart(monkeypatch):
    clock = Clock(monkeypatch)
    speed = Throughput(torch.device("cpu"), ["n1"])

    def batches():
        for _ in range(2):
            clock.now += 1.0  # load
            yield "batch"

    speed.start()
    for _ in speed.loading(batches()):
        clock.now += 2.0  # forward, backward
        speed.ready()
        clock.now += 4.0
        speed.reduced()
        clock.now += 3.0  # optimizer
        speed.done(64, 64)
    record = speed.window()
    assert record == {
        "images_per_s": 128 / 20,
        "load": 0.1,
        "compute": 0.5,
        "wait": 0.4,
        "rank_images_per_s_min": 128 / 12,
        "rank_images_per_s_median": 128 / 12,
        "rank_images_per_s_max": 128 / 12,
        "slowest_rank": 0,
        "slowest_host": "n1",
    }
    assert record.keys() <= NONDETERMINISTIC_KEYS
    clock.now += 30.0  # a checkpoint, say: no step
    speed.stop()
    assert speed.mean() == 128 / 50
    assert Throughput(torch.device("cpu"), ["n1"]).mean() is None


def test_the_slowest_rank_is_the_one_that_needs_longest_for_an_image():
    # images, seconds of load, own, wait, all
    rows = torch.tensor([[32.0, 0, 2, 6, 8], [64, 0, 3, 5, 8], [16, 0, 4, 4, 8], [0, 0, 1, 7, 8]], dtype=torch.float64)
    record = summarise(rows, ["a", "b", "c", "d"])
    assert (record["slowest_rank"], record["slowest_host"]) == (2, "c")
    assert record["rank_images_per_s_min"] == 4.0
    assert record["rank_images_per_s_median"] == 16.0
    assert record["rank_images_per_s_max"] == 64 / 3
    assert record["wait"] == pytest.approx((6 + 5 + 4 + 7) / 32)


def test_without_a_rank_that_worked_none_is_slowest():
    record = summarise(torch.tensor([[0.0, 0, 1, 1, 2]], dtype=torch.float64), ["a"])
    assert "slowest_rank" not in record


def test_metrics_are_of_the_training_not_of_the_machine():
    assert not set(Metrics(1.0, 0.5, 3).to_dict()) & NONDETERMINISTIC_KEYS
