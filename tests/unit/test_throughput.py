from types import SimpleNamespace

import pytest
import torch

from distlenet.tracking.base import NONDETERMINISTIC_KEYS
from distlenet.training.meter import Metrics
from distlenet.training.step_result import StepTimes
from distlenet.training.throughput import Throughput, summarise
from distlenet.utils.clock import Clock

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


class FakeTime:
    """A clock that the test advances."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)


class FakeBatch:
    """64 samples over all ranks, 16 of them on this rank."""

    global_size = 64

    def __len__(self):
        return 16


@pytest.mark.usefixtures("group")
def test_loading_computing_and_waiting_are_separated(monkeypatch):
    time, clock = FakeTime(monkeypatch), Clock(CPU)
    throughput = Throughput(CPU, ["n1"])

    def batches():
        for _ in range(2):
            time.now += 1.0  # load
            yield FakeBatch()

    throughput.start()
    for batch in throughput.time_loading(batches()):
        time.now += 2.0  # forward and backward pass
        ready = clock.mark()
        time.now += 4.0  # all-reduce
        reduced = clock.mark()
        time.now += 3.0  # optimizer
        times = StepTimes(ready, ready, reduced, clock.mark())
        throughput.add(batch, SimpleNamespace(times=times))
    record = throughput.window()
    assert record == {
        "images_per_s": 128 / 20,
        "load": 0.1,
        "compute": 0.5,
        "wait": 0.4,
        "rank_images_per_s_min": 32 / 12,
        "rank_images_per_s_median": 32 / 12,
        "rank_images_per_s_max": 32 / 12,
        "slowest_rank": 0,
        "slowest_host": "n1",
    }
    assert record.keys() <= NONDETERMINISTIC_KEYS
    time.now += 30.0  # work between steps, such as a checkpoint
    throughput.stop()
    assert throughput.mean() == 128 / 50
    assert Throughput(CPU, ["n1"]).mean() is None


def test_slowest_rank_needs_the_most_time_per_image():
    # images; seconds of load, own time, wait and in total
    rows = torch.tensor([[32.0, 0, 2, 6, 8], [64, 0, 3, 5, 8], [16, 0, 4, 4, 8], [0, 0, 1, 7, 8]], dtype=torch.float64)
    record = summarise(rows, ["a", "b", "c", "d"])
    assert (record["slowest_rank"], record["slowest_host"]) == (2, "c")
    assert record["rank_images_per_s_min"] == 4.0
    assert record["rank_images_per_s_median"] == 16.0
    assert record["rank_images_per_s_max"] == 64 / 3
    assert record["wait"] == pytest.approx((6 + 5 + 4 + 7) / 32)


def test_no_rank_is_slowest_if_none_had_images():
    record = summarise(torch.tensor([[0.0, 0, 1, 1, 2]], dtype=torch.float64), ["a"])
    assert "slowest_rank" not in record


def test_unknown_own_times_are_omitted():
    """As in replayed CUDA graphs."""
    rows = torch.tensor([[8.0, 1, float("nan"), float("nan"), 4]], dtype=torch.float64)
    assert summarise(rows, ["a"]) == {"load": 0.25}


def test_metrics_do_not_depend_on_the_machine():
    assert not set(Metrics({"loss": 1.0, "accuracy": 0.5}, 3).to_dict()) & NONDETERMINISTIC_KEYS
