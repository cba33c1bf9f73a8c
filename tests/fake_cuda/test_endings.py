"""How a run with a captured step ends: a signal, an error, a peer that is gone."""

import json
from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

PROGRAM = Path(__file__).parent / "training_program.py"


def train(directory, *words, graph="auto"):
    """Train 3 epochs of 23 steps with the events; those after step 12 are replayed."""
    settings = ("data.name=digits", "train.epochs=3", "train.global_batch_size=64", "precision=fp32", "device=cuda")
    settings += (f"train.cuda_graph={graph}", "run.report=never", f"run.dir={directory}", "run.name=run")
    return run(PROGRAM, *settings, *words)


def report(ended):
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("report ")]
    return json.loads(line.partition(" ")[2])


def test_an_orderly_end_resets_the_graph_before_nccl_ends(tmp_path):
    ended = train(tmp_path).succeeded()
    assert report(ended)["graph destroyed"] >= 1
    assert "ncclCommDestroy" in report(ended)["notes"]
    assert ended.stderr == ""  # the runtime reports a graph that lives longer


@pytest.mark.parametrize("graph", ["off", "auto"])
@pytest.mark.parametrize(
    ("event", "line"), [("raise", "RuntimeError: on purpose"), ("interrupt", "stopped by SIGINT (Ctrl-C)")]
)
def test_an_exception_is_printed_although_a_peer_never_answers(tmp_path, graph, event, line):
    ended = train(tmp_path, "20=hang", f"22={event}", graph=graph)
    assert ended.status != 0
    assert line in ended.stderr
    assert "ncclCommAbort" in report(ended)["notes"]
    assert report(ended)["seconds after the hang"] < 60


@pytest.mark.parametrize(("event", "status", "lines"), [("terminate", 75, 1), ("ctrl_c", 130, 2)])
def test_a_stop_request_during_replays_saves(tmp_path, event, status, lines):
    ended = train(tmp_path, f"20={event}")
    assert ended.status == status
    assert "saved; run the same command again" in ended.stderr
    assert ended.stderr.count("\n") == lines
    assert "ncclCommDestroy" in report(ended)["notes"]


def test_memory_is_constant_after_a_failed_capture(tmp_path):
    """Over 250 steps: the tensors that live to the byte, and the segments that the allocator holds."""
    settings = ("data.name=synthetic", "data.synthetic_train=9000", "data.synthetic_test=64", f"data.root={tmp_path}")
    settings += (
        "train.global_batch_size=8",
        "train.max_steps=300",
        "data.device=cpu",  # copied on another stream: these blocks leak while the allocator believes in a capture
        "model.name=fake_cuda.unrecordable_net:UnrecordableNet",
    )
    settings += ("device=cuda", "train.cuda_graph=auto", "run.report=never", f"run.dir={tmp_path}", "precision=fp32")
    ended = run(PROGRAM, *settings, "train.log_every=500", "30=memory", "280=memory").succeeded()
    before, after = (line for line in ended.stdout.splitlines() if line.startswith("memory "))
    assert before == after
    (reason,) = ended.stderr.splitlines()
    assert reason.startswith("distlenet: train.cuda_graph=auto: the step cannot be captured")


def test_all_ranks_run_eagerly_if_one_cannot_capture(tmp_path):
    """A rank that replayed its all-reduce together with eager ones of others would fail (test_rules.py)."""
    settings = ("model.name=fake_cuda.unrecordable_net:UnrecordableNet", "model.args.rank=1", "data.name=synthetic")
    settings += ("data.synthetic_train=640", "data.synthetic_test=64", f"data.root={tmp_path}", "train.max_steps=18")
    settings += ("train.global_batch_size=8", "device=cuda", "train.cuda_graph=auto", "run.report=never")
    ended = run(PROGRAM, *settings, f"run.dir={tmp_path}", ranks=2).succeeded()
    (line,) = ended.stderr.splitlines()
    assert line.startswith("distlenet: train.cuda_graph=auto: the step cannot be captured, so it runs eagerly: ")
