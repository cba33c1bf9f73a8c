"""The parts of ``distlenet.prove``: digests, listings, direct checks of hooks, the comparison of records."""

import glob
import json
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import prove_tasks
import pytest
import torch
from conftest import REPO, run_command
from PIL import Image

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.prove.__main__ import main
from distlenet.prove.causes import CAUSES
from distlenet.prove.comparison import Promise, compare
from distlenet.prove.contract import Contract
from distlenet.prove.digests import digest, is_per_sample, sample_digests, take
from distlenet.prove.listing import sort_listings
from distlenet.prove.processes import Job, ProcessFailed
from distlenet.prove.recording import Recorder, recorded
from distlenet.prove.trials import plan
from distlenet.tasks.image_classification import ImageClassification

pytestmark = pytest.mark.unit

VALUES = [
    torch.arange(3),
    torch.arange(3.0),
    torch.tensor(3.0),
    torch.tensor([3.0]),
    torch.tensor([3.0]).bfloat16(),
    np.arange(3),
    np.arange(3).reshape(3, 1),
    Image.new("L", (2, 3)),
    Image.new("L", (3, 2)),
    Image.new("RGB", (2, 3), "red"),
    (1, 2),
    [[1], 2],
    {"a": 1},
    {"b": 1},
    "1",
    1,
    1.0,
    True,
    None,
    b"1",
    Path("1"),
]


def test_digests_of_different_values_differ():
    assert len({digest(value) for value in VALUES}) == len(VALUES)
    assert [digest(value) for value in VALUES] == [digest(value) for value in VALUES]


BATCH = {
    "image": torch.arange(24.0).reshape(4, 2, 3),
    "pair": (torch.tensor([True, False, True, True]), torch.arange(4).bfloat16()),
    "words": [torch.arange(length) for length in (0, 1, 2, 3)],
    "empty": torch.zeros(4, 0),
}


def test_a_sample_has_the_same_digest_in_any_batch():
    whole = sample_digests(BATCH, 4)
    assert len(set(whole)) == 4
    assert sample_digests(take(BATCH, [2, 0]), 2) == [whole[2], whole[0]]
    assert sample_digests(take(BATCH, []), 0) == []
    with pytest.raises(TypeError, match="holds a str"):
        sample_digests({"name": "x"}, 4)


def test_outputs_that_belong_to_samples_are_recognised():
    assert is_per_sample(BATCH, 4)
    assert not is_per_sample(BATCH, 3)
    assert not is_per_sample({"scores": torch.zeros(4), "temperature": torch.tensor(1.0)}, 4)
    assert not is_per_sample((torch.zeros(4), None), 4)


@pytest.mark.parametrize(("descending", "expected"), [(False, "a b c"), (True, "c b a")])
def test_directories_are_listed_in_the_given_order(tmp_path, monkeypatch, descending, expected):
    monkeypatch.setattr(os, "listdir", os.listdir)  # restores it
    monkeypatch.setattr(os, "scandir", os.scandir)
    for name in "bac":
        (tmp_path / name).touch()
    sort_listings(descending)
    with os.scandir(tmp_path) as entries:
        listings = [list(entries)]
    listings += [os.listdir(tmp_path), glob.glob(f"{tmp_path}/*"), tmp_path.iterdir(), tmp_path.glob("*")]
    listings.append(next(os.walk(tmp_path))[2])
    assert [" ".join(Path(path).name for path in paths) for paths in listings] == [expected] * 6


CONFIG = load_config([], ["device=cpu", "train.global_batch_size=16"])


@pytest.fixture(scope="module")
def check():
    """Check the hooks of a task; return the result."""
    with init_distributed(CONFIG) as context:

        def run(task_class):
            contract = Contract(CONFIG, task_class(CONFIG), context)
            contract.run()
            return contract

        yield run


def test_a_correct_task_passes(check):
    contract = check(prove_tasks.Correct)
    assert [finding for finding in contract.findings if finding.cause] == []
    assert not contract.mixes_in_training
    hooks = {finding.check.partition(":")[0] for finding in contract.findings}
    assert hooks == {"dataset", "collate", "transform", "loss", "metrics", "model"}


BROKEN = [
    ("OwnGenerator", "dataset again", "dataset"),
    ("GlobalCounter", "dataset again", "dataset"),
    ("PaddingCollate", "collate", "collate"),
    ("UnkeyedTransform", "transform again", "transform"),
    ("BatchTransform", "transform alone", "transform"),
    ("MixingLoss", "loss alone", "loss"),
    ("MeanLoss", "loss shape", "loss"),
    ("ExpandedMean", "loss mean", "loss"),
    ("ExpandedMeanOfZeros", "loss mean", "loss"),
    ("RandomLoss", "loss again", "loss"),
    ("MixingModel", "model alone", "model"),
    ("Padded", "model alone", "model"),
    ("RandomModel", "model again", "model"),
    ("HiddenState", "model state", "model"),
    ("MixingMetric", "metrics alone", "metrics"),
    ("MeanMetric", "metrics shape", "metrics"),
]


@pytest.mark.parametrize(("task", "cause", "hook"), BROKEN)
def test_a_broken_hook_is_found(check, task, cause, hook):
    contract = check(getattr(prove_tasks, task))
    assert {finding.cause for finding in contract.findings if finding.cause} == {cause}
    assert CAUSES[cause].hook == hook


@pytest.mark.parametrize("hook", ["datasets", "transform", "model", "loss", "metrics", "collate"])
def test_an_exception_names_the_hook(check, hook):
    def fail(*_):
        raise KeyError("labels")

    contract = check(type("Failing", (prove_tasks.Correct,), {hook: fail}))
    (finding,) = [finding for finding in contract.findings if finding.cause]
    assert (finding.cause, finding.detail) == ("raised", "KeyError: 'labels'")
    assert finding.hook == hook.replace("datasets", "dataset")


def test_dropout_and_batchnorm_mix_in_training(check):
    for layer in (torch.nn.Dropout(), torch.nn.BatchNorm1d(4)):
        task = type("Mixing", (prove_tasks.Correct,), {"first": layer, "model": with_first_layer})
        contract = check(task)
        assert [finding for finding in contract.findings if finding.cause] == []
        assert contract.mixes_in_training


def with_first_layer(self):
    return torch.nn.Sequential(self.first, prove_tasks.Correct.model(self))


def record(directory, *lines, gradient=(1.0, 2.0)):
    directory.mkdir()
    text = "".join(json.dumps({"place": p, "stage": s, "values": v}) + "\n" for p, s, v in lines)
    (directory / "rank-1.jsonl").write_text(text)
    torch.save({"weight": torch.tensor(gradient)}, directory / "gradients.pt")
    return directory


REFERENCE = [
    ("step 0", "initial weights", {"weight": "a"}),
    ("step 0", "raw samples", {"3": "b", "5": "c"}),
    ("step 0", "transformed inputs", {"3": "d", "5": "e"}),
    ("step 0", "losses", {"3": [0.5], "5": [0.25]}),
    ("step 0", "gradients", {"weight": "f"}),
    ("step 1", "raw samples", {"4": "b", "6": "c"}),
    ("test after 1", "metrics", {"accuracy of sample 2": 1.0}),
]


def changed(number, values):
    place, stage, _ = REFERENCE[number]
    return [*REFERENCE[:number], (place, stage, values), *REFERENCE[number + 1 :]]


@pytest.mark.parametrize(
    ("lines", "place", "stage", "detail"),
    [
        (changed(0, {"weight": "x"}), "step 0", "initial weights", "first weight"),
        (changed(1, {"3": "b", "7": "c"}), "step 0", "batches", "first sample 5"),
        (changed(2, {"3": "d", "5": "x"}), "step 0", "transformed inputs", "first sample 5"),
        (changed(3, {"3": [0.5], "5": [0.2500001]}), "step 0", "losses", "[[0.25]], [[0.2500001]]"),
        (
            changed(6, {"accuracy of sample 2": 0.0}),
            "test after 1",
            "metrics",
            "of sample 2: [1.0], [0.0]",
        ),
        (REFERENCE[:5] + REFERENCE[6:], "step 1", "batches", "2 of 2 differ"),
        ([*REFERENCE, ("step 1", "raw samples", {"4": "b"})], "step 1", "batches", "first sample 4"),
    ],
)
def test_the_first_difference_is_named(tmp_path, lines, place, stage, detail):
    one, other = record(tmp_path / "one", *REFERENCE), record(tmp_path / "other", *lines)
    results, difference = compare(one, other, Promise(same_bits=True))
    assert (difference.place, difference.stage) == (place, stage)
    assert detail in difference.detail
    assert results[stage] == "differs"
    results, difference = compare(one, one, Promise(same_bits=True))
    assert set(results.values()) == {"same"}
    assert difference is None


def test_ddp_promises_only_close_gradients_between_numbers_of_ranks(tmp_path):
    one = record(tmp_path / "one", *REFERENCE)
    close = changed(3, {"3": [0.5], "5": [0.2501]})
    close[4] = ("step 0", "gradients", {"weight": "x"})
    near = record(tmp_path / "near", *close, gradient=(1.0, 2.001))
    results, difference = compare(one, near, Promise(same_bits=False))
    assert difference is None
    assert (results["losses"], results["gradients"], results["weights"]) == ("close", "close", "-")
    far = record(tmp_path / "far", *REFERENCE, gradient=(1.0, 2.01))
    assert compare(one, far, Promise(same_bits=False))[1].stage == "gradients"
    assert compare(one, far, Promise(same_bits=False, close=False))[1] is None


def test_micro_batches_in_turn_are_recorded_with_their_own_samples(tmp_path):
    """With global statistics and ``exact``, each one is computed in a thread; a rank without samples has an example."""
    recorder = Recorder(tmp_path)
    task = recorded(prove_tasks.Correct(load_config()), recorder, 8)
    model, samples = task.model(), [(torch.full((1, 4), float(label)), torch.tensor([label])) for label in range(3)]
    digests = [sample_digests(sample, 1)[0] for sample in samples]
    recorder.begin("step 0", torch.tensor([7, 8]))
    recorder.add_inputs(digests[:2], digests[:2])
    _, outputs = task.loss(model, samples[0])
    other = threading.Thread(target=task.loss, args=(model, samples[1]))
    other.start()
    other.join()
    task.metrics(outputs, samples[0])
    recorder.begin("step 1", torch.zeros(0))
    task.loss(model, samples[2])
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()][2:]
    assert [list(line["values"]) for line in lines] == [["7"], ["8"], ["accuracy of sample 7"]]


def test_runs_are_killed_twice():
    assert [run.ranks for run in plan([1, 2, 4], 6, exact=False)] == [(1,), (2,), (4,), (1,), (2, 2, 2)]
    assert [run.kills for run in plan([1, 2, 4], 6, exact=False)] == [(), (), (), (), (2, 4)]
    assert plan([1, 2, 4, 8], 47, exact=True)[-1].ranks == (1, 2, 4, 8, 1)
    assert plan([1, 2], 3, exact=True)[-1].kills == (1, 2)
    assert plan([2], 3, exact=True)[-1].ranks == (2, 2, 2)


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_that_does_not_end_within_the_time_limit_is_a_failure(tmp_path, monkeypatch, killed):
    monkeypatch.setattr("distlenet.prove.processes.LIMIT_S", 0.1)
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    with pytest.raises(ProcessFailed, match=r"ranks \[0\] have not ended after 0\.1 s, the time limit"):
        Job(tmp_path, [process]).wait(killed)
    assert process.exitcode == -signal.SIGKILL


def test_a_scheduler_that_ends_a_proof_leaves_no_directory(tmp_path):
    code = (
        "import os, runpy\n"
        "from distlenet.prove import processes\n"
        "processes.start = lambda *_, **__: os.kill(os.getpid(), int(os.environ['SIGNAL']))\n"
        "runpy.run_module('distlenet.prove', run_name='__main__')"
    )
    env = {"TMPDIR": str(tmp_path), "SIGNAL": str(int(signal.SIGTERM))}
    ended = run_command(sys.executable, "-c", code, env=env)
    assert (ended.status, ended.stderr) == (128 + signal.SIGTERM, ""), str(ended)
    assert not list(tmp_path.glob("prove-*"))


def test_a_number_of_ranks_has_only_decimal_digits(fails, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prove", "--ranks", "\u00b2"])
    assert "\u00b2" in fails(main)


def test_the_documentation_lists_the_causes():
    page = (REPO / "docs/prove.md").read_text()
    rows = [f"| {cause.hook} | {cause.why} | {cause.fix} |" for cause in CAUSES.values() if cause.hook]
    assert [row for row in rows if row not in page] == []


def test_the_transform_of_a_recorded_task_is_called_in_each_step(tmp_path):
    """Otherwise, data on a GPU is transformed once, before a step can be recorded."""
    task = ImageClassification(load_config())
    assert not task.random_transform
    assert recorded(task, Recorder(tmp_path), 8).random_transform
