"""The memory snapshot of a job's steps on the fake GPU. It has no profiler of kernels, so the trace has none."""

import json
import pickle
from pathlib import Path

import pytest

from fake_cuda.profiling_program import allocated
from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda


def test_the_snapshot_has_the_allocations_of_the_profiled_steps_with_their_stacks(tmp_path):
    program = Path(__file__).with_name("profiling_program.py")
    ended = run(program, tmp_path).succeeded()
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"steps-1-2.rank-0.pt.trace.json.gz", "steps-1-2.rank-0.memory.pickle"}
    snapshot = pickle.loads((tmp_path / "profile/steps-1-2.rank-0.memory.pickle").read_bytes())
    assert allocated(snapshot) == [2, 3]
    frames = [event["frames"] for event in snapshot["device_traces"][0] if event["action"] == "alloc"]
    assert all(any(frame["filename"] == str(program) for frame in stack) for stack in frames)
    assert json.loads(ended.stdout) == []  # nothing is recorded after these steps
