"""The trace of a job's steps, as its file holds it."""

import gzip
import json

import pytest
import torch

from distlenet import train
from distlenet.config.loading import identity, load_config
from distlenet.training.profiling import StepProfiler, phase
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def config_of(directory, *more):
    settings = ("data.name=digits", "device=cpu", "train.global_batch_size=512", "train.max_steps=6", "run.name=run")
    return load_config([], [*settings, f"run.dir={directory}", *more])


def events(path):
    """Return the events with a duration in a trace file: their name, begin and end, by their begin."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    timed = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    return [(name, begin, end) for begin, end, name in sorted(timed)]


def weights(directory):
    return torch.load(directory / "run/checkpoints/last.pt", weights_only=True)["model"]


def test_the_trace_has_the_profiled_steps_only_and_the_weights_are_the_same(tmp_path):
    """An epoch has three steps, so an evaluation lies between the two profiled steps."""
    train.train(config_of(tmp_path / "profiled", "train.profile_steps=2:4"))
    train.train(config_of(tmp_path / "plain"))
    (path,) = (tmp_path / "profiled/run/profile").iterdir()
    assert path.name == "steps-2-3.rank-0.pt.trace.json.gz"
    found = events(path)
    steps = [event for event in found if event[0].startswith("ProfilerStep#")]
    assert [name for name, *_ in steps] == ["ProfilerStep#2", "ProfilerStep#3"]
    for part in ("forward", "backward", "Optimizer.step#SGD.step"):
        inside = [[name for name, b, e in found if name == part and begin <= b <= e <= end] for _, begin, end in steps]
        assert inside == [[part], [part]], part
        assert [name for name, *_ in found].count(part) == 2, part
    operators = [event for event in found if event[0].startswith("aten::")]
    assert steps[0][1] <= min(begin for _, begin, _ in operators)
    assert max(end for *_, end in operators) <= steps[1][2]
    profiled, plain = weights(tmp_path / "profiled"), weights(tmp_path / "plain")
    assert profiled.keys() == plain.keys()
    assert all(torch.equal(profiled[name], plain[name]) for name in plain)
    assert not (tmp_path / "plain/run/profile").exists()


def test_profiling_is_no_part_of_the_identity_of_a_run(tmp_path):
    assert identity(config_of(tmp_path, "train.profile_steps=2:4")) == identity(config_of(tmp_path))


def take_steps(profiler, count, first):
    for _ in profiler.follow(iter(range(count)), first):
        with phase("work"):
            torch.ones(2) + 1


def test_steps_are_counted_in_this_job_and_named_in_the_run(tmp_path):
    profiler = StepProfiler(range(3, 5), 100, 0, CPU, tmp_path)
    for first in (40, 42, 44):  # three epochs of two steps; the job resumed at step 40
        take_steps(profiler, 2, first)
    profiler.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-43-44.rank-0.pt.trace.json.gz"
    names = [name for name, *_ in events(path) if name.startswith(("Prof", "work"))]
    assert names == ["ProfilerStep#43", "work", "ProfilerStep#44", "work"]


@pytest.mark.parametrize(("steps", "rank"), [(range(0), 0), (range(1, 2), 1)])
def test_without_steps_and_on_other_ranks_nothing_is_done(tmp_path, steps, rank):
    batches = [1, 2, 3]
    profiler = StepProfiler(steps, 3, rank, CPU, tmp_path)
    assert profiler.follow(batches, 0) is batches
    assert phase("forward") is phase("backward")  # no label is made
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_all_ranks_are_traced_if_requested(tmp_path):
    for rank in (0, 1):
        profiler = StepProfiler(range(1, 2), 2, rank, CPU, tmp_path, all_ranks=True)
        take_steps(profiler, 2, 0)
        profiler.close()
    paths = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in paths] == [f"steps-1-1.rank-{rank}.pt.trace.json.gz" for rank in (0, 1)]
    for path in paths:
        assert [name for name, *_ in events(path) if name.startswith(("Prof", "work"))] == ["ProfilerStep#1", "work"]


def test_a_range_beyond_the_end_of_the_run_is_an_error(tmp_path):
    StepProfiler(range(2, 6), 6, 0, CPU, tmp_path)
    with pytest.raises(
        UserError, match=r"profile_steps=2:7: the run has 6 steps; give a range that ends at 6 or befor"
    ):
        train.train(config_of(tmp_path, "train.profile_steps=2:7"))


@pytest.mark.parametrize("taken", [1, 3, 4])
def test_a_job_that_ends_earlier_has_no_trace_and_ends_the_profiler(tmp_path, capsys, taken):
    profiler = StepProfiler(range(3, 5), 100, 0, CPU, tmp_path)
    take_steps(profiler, taken, 0)
    profiler.close()
    assert f"train.profile_steps=3:5: no trace, since this job took {taken} steps" in capsys.readouterr().err
    assert not torch._C._autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_stop_the_training(tmp_path, capsys):
    (tmp_path / "profile").write_text("no directory")
    profiler = StepProfiler(range(1), 2, 0, CPU, tmp_path)
    take_steps(profiler, 2, 0)
    profiler.close()
    assert capsys.readouterr().err.count("steps-0-0.rank-0.pt.trace.json.gz: cannot be written: File exists") == 1
