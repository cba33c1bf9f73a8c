"""``make gpu-report`` without a GPU: order, budget, failures, page and exit status; contestants on the CPU."""

import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO

sys.path.append(str(REPO / "benchmarks"))
import gpu_report
from gpu import bits, machine, runs, speed, turns
from gpu.options import REQUIRED, Options, parse_requirement
from gpu.questions import Question
from gpu.result import Promise, Result, load, table
from gpu.turns import Measured

pytestmark = pytest.mark.unit

LIMIT_S = 60.0  # for a question that imports nothing; ends in less than a second


def question(name, expected_s=0.0, limit_s=LIMIT_S):
    return Question(name, f"The question {name}", f"gpu_questions:{name}", expected_s, limit_s)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Return a function that runs the program with some questions, and returns exit status and page."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(gpu_report, "missing", lambda _: [])
    monkeypatch.setattr(gpu_report, "facts", lambda _: [("GPU", "none")])

    def run(questions, *words):
        out = tmp_path / "GPU.md"
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(out), *words])
        with pytest.raises(SystemExit) as ended:
            gpu_report.main(questions)
        return ended.value.code, out.read_text()

    return run


def test_kept_promises(report):
    status, page = report([question("kept"), question("faster")])
    assert status == 0
    assert "| GPU | none |" in page
    assert "| ok | is kept | scale 1 |" in page
    assert "| ok | 20 times as fast | 25 |" in page
    assert "## The question kept\n\n| a |\n" in page


def test_a_broken_promise_is_a_failure(report):
    status, page = report([question("faster"), question("kept")], "--require", "plain=1e9")
    assert status == 1
    assert "| **FAIL** | 1e+09 times as fast | 25 |" in page
    assert "| ok | is kept |" in page


def test_a_crash_is_a_failure_and_the_others_are_asked(report):
    status, page = report([question("crash"), question("kept")])
    assert status == 1
    assert "| ok | precedes the crash |" in page
    assert "| **FAIL** | the question is answered: The question crash | failed: exit status 1 |" in page
    assert "ZeroDivisionError: on purpose" in page
    assert "| ok | is kept |" in page


def test_a_question_that_hangs_is_ended(report):
    status, page = report([question("hang", limit_s=3), question("kept")])
    assert status == 1
    assert "| **FAIL** | the question is answered: The question hang | failed: still running after 3 s |" in page
    assert "| before |" in page
    assert "| ok | is kept |" in page


def test_questions_that_do_not_fit_are_not_asked(report):
    status, page = report([question("kept", expected_s=1e6), question("faster")], "--budget-s", "300")
    assert status == 1
    assert "| **FAIL** | the question is answered: The question kept | not run: " in page
    assert re.search(r"not run: \d+ s of the budget were left \|", page)
    assert "| ok | 20 times as fast |" in page


def test_only_some_questions(report):
    status, page = report([question("kept"), question("crash")], "--only", "kept", "--steps-scale", "0.5")
    assert status == 0
    assert "scale 0.5" in page
    assert "not measurements" in page
    assert "crash" not in page


def test_the_page_is_written_before_and_after_each_question(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    out, pages = tmp_path / "GPU.md", []
    monkeypatch.setattr(gpu_report, "page", lambda answers, *_: pages.append([a.status for a in answers]) or "")
    gpu_report.run([question("kept"), question("crash")], Options(), 60, out, [])
    failed = "failed: exit status 1"
    assert pages == [["not run", "not run"], ["answered", "not run"], ["answered", failed]]


@pytest.mark.parametrize(("text", "reason"), [("speed=1", "expected NAME=NUMBER with one of"), ("plain=x", "float")])
def test_wrong_requirements(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_requirement(text)


def test_missing_packages(monkeypatch):
    versions = {"torch": "2.10.1+cu130", "rich": "13.7"}

    def version(name):
        if name not in versions:
            raise machine.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(machine, "version", version)
    declared = ["torch>=2.11", "rich>=13.7", "omegaconf>=2.4", "wandb>=0.24"]
    assert machine.missing(declared) == ["torch>=2.11 (found 2.10.1+cu130)", "omegaconf>=2.4"]


def test_without_a_gpu_the_reason_is_reported(monkeypatch, capsys, tmp_path):
    def facts(command):
        raise RuntimeError("no GPU")

    monkeypatch.setattr(gpu_report, "missing", lambda _: [])
    monkeypatch.setattr(gpu_report, "facts", facts)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path / "GPU.md")])
    with pytest.raises(SystemExit) as ended:
        gpu_report.main([question("kept")])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "GPU.md").exists()


def test_all_questions_fit_in_the_budget_and_exist():
    questions = gpu_report.QUESTIONS
    assert sum(question.expected_s for question in questions) <= 720
    assert all(question.expected_s < question.limit_s for question in questions)
    for question in questions:
        module, _, name = question.function.partition(":")
        assert f"def {name}(" in (REPO / f"benchmarks/{module.replace('.', '/')}.py").read_text()


def test_a_result_survives_its_process(tmp_path):
    result = Result(tmp_path / "result.json")
    result.show("a", "1")
    result.show("a", "2")
    result.promise("b", False, "c")
    saved = load(tmp_path / "result.json")
    assert (saved.parts, saved.promises) == ({"a": "2"}, [Promise("b", False, "c")])
    assert load(tmp_path / "none.json").promises == []


def test_table():
    assert table(("a", "b"), [("x|y\nz", 2)]) == "| a | b |\n| --- | ---: |\n| x\\|y z | 2 |"


def measured(*step_s, failure=""):
    return Measured([{"s": value * 10, "steps": 10, "peak_mib": 5.0} for value in step_s], failure)


def test_speeds_are_compared_within_rounds():
    rows = {
        "ours": measured(0.1, 0.2, 0.3),
        "bare graph replay": measured(0.08, 0.18, 0.6),
        "plain": measured(2.0, 6.0, 6.0),
        "gone": measured(failure="out of memory"),
    }
    assert speed.speed_table(60, rows).splitlines()[2:] == [
        "| ours | 300 | 200 to 600 |  | 5 |",
        "| bare graph replay | 333 | 100 to 750 | 0.90 × (0.80 to 2.00) | 5 |",
        "| plain | 10 | 10 to 30 | 20.00 × (20.00 to 30.00) | 5 |",
        "| gone | failed | out of memory |  |  |",
    ]
    result = Result(Path("/dev/null/none"))
    result._save = lambda: None
    speed.promises(result, Options({**REQUIRED, "replay": 0.95}), "fp32", rows)
    speed.promises(result, Options(), "fp32", {**rows, "plain": rows["gone"]})
    assert [(promise.ok, promise.detail) for promise in result.promises] == [
        (True, "20.00"),
        (False, "0.90"),
        (False, "out of memory"),
        (True, "0.90"),
    ]


def checkpoint(run, value):
    (run / "checkpoints").mkdir(parents=True)
    for step, weight in ((5, 0.0), (10, value)):
        state = {"model": {"w": torch.tensor([weight])}, "optimizer": {"state": {0: {"momentum": torch.ones(1)}}}}
        torch.save(state, run / f"checkpoints/step-{step:08}.pt")


def test_runs_are_compared_to_the_bit(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        checkpoint(tmp_path / name, value)
    ended = {tmp_path / name: runs.Ended(0, "", "", 1.0) for name in "abc"}
    ended[tmp_path / "d"] = runs.Ended(-signal.SIGKILL, "", "out of memory\n", 1.0)
    assert bits.compare(tmp_path / "a", tmp_path / "b", ended) == "equal"
    assert bits.compare(tmp_path / "a", tmp_path / "c", ended) == "1 of 2 tensors differ, by at most 1.2e-07"
    assert bits.compare(tmp_path / "a", tmp_path / "d", ended) == "d: out of memory"


@pytest.mark.slow
def test_contestants_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{REPO}:{REPO / 'benchmarks'}")
    ours = ["ours", "--batch=8", "--device=cpu", "data.name=digits", f"run.dir={tmp_path}", "run.name=run"]
    contestants = {
        "ours": [*ours, "train.epochs=1000", "distributed.shared_memory=off"],
        "limit": ["limit", "--batch=8", "--device=cpu"],
        "wrong": [*ours, "optim.name=none"],
    }
    found = turns.measure(contestants, tmp_path, rounds=2, turn_s=0.02)
    for name in ("ours", "limit"):
        assert (found[name].failure, len(found[name].turns)) == ("", 2), found[name].log
        assert all(turn["steps"] >= 2 and 0 < turn["host_s"] <= turn["s"] < turns.LIMIT_S for turn in found[name].turns)
    assert "optim.name=none" in found["wrong"].failure
    assert found["wrong"].turns == []
