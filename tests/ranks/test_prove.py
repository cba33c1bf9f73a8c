"""``python -m distlenet.prove``, as a user calls it: exit status, and the hook that it names."""

import re

import pytest
from conftest import REPO
from forked import run_python

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

ENVIRONMENT = {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}


def prove(task: str, *words: str):
    settings = (f"task.name=prove_tasks:{task}", "device=cpu", "train.global_batch_size=16")
    return run_python("-m", "distlenet.prove", *settings, *words, env=ENVIRONMENT, timeout=800)


@pytest.mark.parametrize(
    ("task", "hook"),
    [
        ("OwnGenerator", "dataset"),
        ("MeanLoss", "loss"),
        ("FileOrder", "order of data"),
        ("HashOrder", "dataset"),
    ],
)
def test_a_broken_task_fails_and_its_hook_is_named(task, hook):
    """tests/unit/test_prove.py has more of them; the last two differ only between processes."""
    ended = prove(task)
    assert ended.status == 1, str(ended)
    assert re.findall(r"^Hook to correct: (.*)$", ended.stdout, re.MULTILINE) == [hook], str(ended)


@pytest.mark.parametrize(
    ("task", "stage", "place"),
    [
        ("OfTheWorker", "raw samples", "step 0"),
        ("LateState", "losses", r"step [2345]"),
    ],
)
def test_what_the_hooks_alone_do_not_show_is_found_by_the_runs(task, stage, place):
    ended = prove(task, "--ranks", "1", "2")
    assert ended.status == 1, str(ended)
    assert re.search(rf"first difference is in {stage} of {place}:", ended.stdout), str(ended)


def test_data_that_depends_on_the_rank_is_refused():
    ended = prove("OfTheRank", "--ranks", "1", "2")
    assert ended.status == 2, str(ended)
    assert "the data differs between ranks: train (96 samples" in ended.stderr


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_a_correct_task_passes(reduction):
    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=8")
    ended = prove("Correct", "--ranks", "1", "2", *settings).succeeded()
    assert ended.stdout.endswith("Everything that is promised holds.\n")
    rows = dict(re.findall(r"^  (\w+(?: \w+)*)  +((?:same|close|-).*)$", ended.stdout, re.MULTILINE))
    between_ranks = ["close", "-"] if reduction == "ddp" else ["same", "same"]
    assert [rows[stage].split()[0] for stage in ("gradients", "weights")] == between_ranks
    assert rows["weights"].split()[1:] == ["same", "same"]


def test_a_wrong_setting_is_a_user_error():
    ended = prove("Correct", "--ranks", "3")
    assert ended.status == 2, str(ended)
    assert "train.global_batch_size=16" in ended.stderr
    assert ended.stdout == ""  # nothing was started
    assert prove("Missing").status == 2
