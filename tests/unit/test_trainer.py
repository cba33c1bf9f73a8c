import contextlib
import json
import multiprocessing.util
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import LIMIT_S

from distlenet import evaluate, train
from distlenet.checkpoint.store import CheckpointStore
from distlenet.config.loading import load_config
from distlenet.distributed.preemption import worker_init_fn
from distlenet.reduction.replica_check import ReplicaMismatch
from distlenet.report.page import write_report
from distlenet.report.runs import read_run
from distlenet.task import Datasets, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import tensors_in

pytestmark = pytest.mark.unit


def train_digits(tmp_path, *more):
    """Train two steps on the bundled digits, in ``tmp_path/run``."""
    settings = ("data.name=digits", "device=cpu", "train.max_steps=2", "run.name=run", f"run.dir={tmp_path}", *more)
    return train.train(load_config([], settings))


def test_final_evaluation_writes_its_error_analysis(tmp_path):
    summary = train_digits(tmp_path)
    report = json.loads((tmp_path / "run/test.json").read_text())
    assert report["classes"] == list("0123456789")
    assert sum(map(sum, report["confusion"])) == summary["test_count"] == 360
    correct = sum(report["confusion"][digit][digit] for digit in range(10))
    assert correct / 360 == pytest.approx(summary["test_accuracy"])
    assert all(mistake["label"] != mistake["predicted"] for mistake in report["mistakes"])
    assert len(report["mistakes"]) == min(24, 360 - correct)


def test_error_analysis_that_cannot_be_written_does_not_fail_the_run(tmp_path, capsys):
    (tmp_path / "run/test.json").mkdir(parents=True)  # no file can replace it
    assert train_digits(tmp_path)["steps"] == 2
    assert "test.json: cannot be written: Is a directory; the report has no confusion matrix" in capsys.readouterr().err


def test_a_run_leaves_no_file_of_its_directory_open(tmp_path):
    train_digits(tmp_path, "data.ledger=true")
    files = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, by another thread or by this loop
            files.append(os.readlink(link))
    assert files
    assert not [file for file in files if file.startswith(str(tmp_path))]


def test_the_workers_of_the_loader_end_by_themselves(tmp_path, monkeypatch):
    """A worker that SIGTERM has to end runs no finalizers, and is waited for."""

    def init_worker(number):
        worker_init_fn(number)
        multiprocessing.util.Finalize(None, (tmp_path / f"worker {number}").touch, exitpriority=0)

    monkeypatch.setattr("distlenet.data.loader.worker_init_fn", init_worker)
    train_digits(tmp_path, "data.num_workers=2")
    assert len(list(tmp_path.glob("worker *"))) == 2


def test_the_memory_of_checkpoints_is_reserved_once_for_the_whole_state(tmp_path, monkeypatch):
    reserved = []

    def reserve(_, state):
        sizes = {name: sum(tensor.nbytes for tensor in tensors_in(state[name])) for name in ("model", "optimizer")}
        reserved.append((state["step"], sizes["optimizer"] >= sizes["model"]))

    monkeypatch.setattr(CheckpointStore, "reserve", reserve)
    train_digits(tmp_path)
    assert reserved == [(1, True)]  # the optimizer has its state: a momentum for each weight


def test_times_count_from_the_call(tmp_path):
    before = time.monotonic()
    summary = train_digits(tmp_path)
    assert 0 < summary["start_s"] < summary["wall_s"] <= time.monotonic() - before


def test_the_times_of_the_command_count_from_the_start_of_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr("distlenet.train.process_age_s", lambda: 1000.0)
    settings = ("data.name=digits", "device=cpu", "train.max_steps=2", "run.name=run", f"run.dir={tmp_path}")
    monkeypatch.setattr("sys.argv", ["distlenet.train", *settings, "run.report=never"])
    train.main()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 1000 < summary["start_s"] < summary["wall_s"] < 1000 + LIMIT_S


@pytest.fixture
def saved_steps(monkeypatch):
    """The step of each checkpoint that is written, in a list."""
    steps, save = [], CheckpointStore.save

    def record(self, state, *arguments, **options):
        steps.append(state["step"])
        save(self, state, *arguments, **options)
        self.wait()  # else an optional checkpoint may be skipped

    monkeypatch.setattr(CheckpointStore, "save", record)
    return steps


@pytest.mark.parametrize(("every", "expected"), [("null", [5]), ("2", [2, 4, 5]), ("5", [5])])
def test_the_last_state_within_an_epoch_is_saved_once(tmp_path, saved_steps, every, expected):
    train_digits(tmp_path, "train.max_steps=5", f"checkpoint.every_steps={every}")
    assert saved_steps == expected


EPOCHS = ("train.max_steps=null", "train.epochs=4", "optim.schedule=constant")


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def checkpoint(tmp_path, name):
    return torch.load(tmp_path / f"run/checkpoints/{name}.pt", weights_only=True)


def test_the_validation_set_is_evaluated_and_selects_the_best_checkpoint(tmp_path):
    summary = train_digits(tmp_path, *EPOCHS, "data.validation=0.25", "optim.lr=0.01", "checkpoint.keep_last=1")
    records = lines(tmp_path)
    assert [record["split"] for record in records] == ["train_epoch", "val", "test"] * 4
    losses = {record["step"]: record["loss"] for record in records if record["split"] == "val"}
    step = min(losses, key=losses.get)
    assert (summary["best_by"], summary["best_value"], summary["best_step"]) == ("val/loss", losses[step], step)
    assert checkpoint(tmp_path, "best")["step"] == step
    assert (summary["val_loss"], summary["val_count"], summary["test_count"]) == (losses[36], 359, 360)
    assert checkpoint(tmp_path, "last")["step"] == summary["steps"] == 36
    assert not summary["stopped_early"]


def test_without_a_validation_set_there_is_no_best_checkpoint(tmp_path):
    summary = train_digits(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["last.pt", "step-00000002.pt"]
    assert "best_step" not in summary
    assert "val_loss" not in summary


def test_a_run_stops_early_and_is_complete(tmp_path, capsys):
    settings = (*EPOCHS, "data.validation=0.25", "optim.lr=1e-9")  # the weights stay the same, and so does the accuracy
    stop = ("train.stop_when=val/accuracy", "train.stop_patience=1")
    summary = train_digits(tmp_path, *settings, *stop)
    assert (summary["epochs"], summary["steps"], summary["stopped_early"]) == (2, 18, True)
    assert json.loads((tmp_path / "run/summary.json").read_text())["stopped_early"]
    assert (tmp_path / "run/test.json").exists()
    before = lines(tmp_path)
    assert "stopped early after step 18" in capsys.readouterr().out
    assert train_digits(tmp_path, *settings, *stop)["steps"] == 18
    assert "this run is complete; to train longer" in capsys.readouterr().out
    assert lines(tmp_path) == before
    longer = ("train.stop_patience=2", "checkpoint.allow_changed=[train.stop_patience]")
    assert train_digits(tmp_path, *settings, *stop, *longer)["epochs"] == 3


@pytest.fixture
def replica_checks(monkeypatch):
    """Whether each check of the replicas succeeds, by number; those that were made are removed."""
    results = dict.fromkeys(range(10), True)

    def check(_):
        if not results.pop(min(results)):
            raise ReplicaMismatch("ranks hold different parameters")

    monkeypatch.setattr("distlenet.training.trainer.check_replicas", check)
    return results


STOPS_EARLY = (
    *EPOCHS,
    "data.validation=0.25",
    "optim.lr=1e-9",
    "train.stop_when=val/accuracy",
    "train.stop_patience=1",
)


@pytest.mark.parametrize(
    ("settings", "checks"),
    [
        (["train.check_replicas_every=null", "train.max_steps=5"], 2),
        (["train.check_replicas_every=null", *STOPS_EARLY], 2),
        (["train.check_replicas_every=2", "train.max_steps=5"], 4),
        (["train.check_replicas_every=5", "train.max_steps=5"], 2),
        (["train.check_replicas_every=9", *STOPS_EARLY], 3),
    ],
)
def test_replicas_are_checked_at_start_and_end(tmp_path, replica_checks, settings, checks):
    train_digits(tmp_path, *settings)
    assert min(replica_checks) == checks


def test_replicas_that_differ_at_the_end_are_not_saved(tmp_path, replica_checks, saved_steps):
    """Otherwise the next start would find a complete run."""
    replica_checks[1] = False
    with pytest.raises(ReplicaMismatch):
        train_digits(tmp_path, "train.check_replicas_every=null", *STOPS_EARLY)
    assert saved_steps == [9]
    assert not (tmp_path / "run/summary.json").exists()


def test_a_metric_that_does_not_exist_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="best_by=val/f1: the task has no such metric; give one of val/loss"):
        train_digits(tmp_path, "data.validation=0.25", "checkpoint.best_by=val/f1")
    assert not (tmp_path / "run/metrics.jsonl").exists()


class Numbers:
    """The numbers 0.0, 0.1 and so on, and twice their values."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def get_batch(self, indices):
        return indices / 10, indices / 5


class Regression(Task):
    """A task without images, accuracy or error analysis."""

    def model(self):
        return torch.nn.Linear(1, 1)

    def datasets(self):
        return Datasets(train=Numbers(40), test=Numbers(25), validation=Numbers(10))

    def loss(self, model, data):
        inputs, targets = data
        outputs = model(inputs.unsqueeze(1)).squeeze(1)
        return (outputs - targets) ** 2, outputs

    def metrics(self, outputs, data):
        return {"absolute_error": (outputs - data[1]).abs()}

    def prediction(self, outputs, data):
        return {"error": outputs - data[1]}

    def summary_metrics(self, predictions):
        return {"median_error": predictions["error"].abs().median()}


@pytest.mark.parametrize("shared_memory", ["auto", "off"])  # the reducers differ
@pytest.mark.parametrize("frozen", ["network", "layer"])
def test_a_network_is_trained_in_training_mode_even_if_the_task_returns_it_in_another(tmp_path, frozen, shared_memory):
    """As transformers' ``from_pretrained`` does."""
    modes = []

    class Pretrained(Regression):
        def model(self):
            network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.0))
            (network if frozen == "network" else network[1]).eval()
            return network

        def loss(self, model, data):
            if len(data[0]) > 1 and torch.is_grad_enabled():  # not the example
                modes.append({module.training for module in model.modules()})
            return super().loss(model, data)

    settings = ("device=cpu", "train.global_batch_size=8", "train.epochs=2", f"run.dir={tmp_path}")
    train.train(load_config([], [*settings, f"distributed.shared_memory={shared_memory}"]), Pretrained)
    assert modes == 10 * [{True}]


@pytest.mark.parametrize("best_by", ["val/absolute_error", "val/median_error"])
def test_a_task_without_accuracy(tmp_path, capsys, best_by):
    settings = ("device=cpu", "train.global_batch_size=8", "train.epochs=2", "train.log_every=1", "optim.lr=0.001")
    run = (f"run.dir={tmp_path}", "run.name=run", "wandb.mode=disabled")
    summary = train.train(load_config([], [*settings, *run, f"checkpoint.best_by={best_by}"]), Regression)
    out = capsys.readouterr().out
    assert "Regression (40 samples)" in out
    assert "The network on the 25 test samples: loss " in out
    assert {"val_median_error", "test_median_error", "test_absolute_error", "test_loss"} <= summary.keys()
    assert summary["best_by"] == best_by
    for split in ("test", "val"):
        evaluated = evaluate.evaluate(tmp_path / "run", split=split, make_task=Regression)
        values = {name: value for name, value in evaluated.items() if name.startswith(f"{split}_")}
        assert len(values) == 4
        assert values == {name: value for name, value in summary.items() if name.startswith(f"{split}_")}
    write_report([read_run(tmp_path / "run")], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<figcaption>Absolute error</figcaption>" in page
    assert "<span>validation median_error</span>" in page
    assert ">validation<" in page  # in the legend
    assert "<span>test accuracy" not in page
