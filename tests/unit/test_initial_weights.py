"""``checkpoint.init_from``: what fits is loaded, what does not is listed, and a run that resumes ignores it."""

import os
from contextlib import closing

import pytest
import torch
from checkpoint_states import lenet_state

from distlenet.checkpoint.format import load_checkpoint, write_atomically
from distlenet.checkpoint.initial_weights import load_initial_weights, read_weights
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.models.lenet import Net
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.records import run_info
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "device=cpu", "train.max_steps=4", "checkpoint.every_steps=1", "optim.lr=0.05")


def train(run_dir, *settings):
    """Train; return the trainer and the weights and averages before the first step."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = load_config([], [*SETTINGS, *settings, f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"])
    started = []

    class Watched(Trainer):
        def start(self):
            super().start()
            average = self.train_step.on_device.weight_average
            started.append({name: value.clone() for name, value in self.model.state_dict().items()})
            started.append(average and {name: value.clone() for name, value in average.state_dict().items()})

    with (
        init_distributed(config) as context,
        closing(Watched(config, context, ImageClassification(config), run_dir, Trackers(), Preemption(1.0))) as trainer,
    ):
        trainer.fit()
    return trainer, *started


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_starts_from_the_evaluated_weights_of_another_and_resumes_without_them(tmp_path, capsys):
    train(tmp_path / "first", "train.ema_decay=0.5", "seed=1")
    average = load_checkpoint(find_checkpoint(tmp_path / "first"))["ema"]
    settings = ("train.ema_decay=0.9", f"checkpoint.init_from={tmp_path / 'first'}")
    whole, weights, averages = train(tmp_path / "second", *settings)
    assert run_info(whole)["initialised_from"] == str(tmp_path / "first/checkpoints/step-00000004.pt")
    assert_same(weights, average)
    assert_same(averages, average)
    assert capsys.readouterr().err == ""  # all tensors fit
    for path in sorted((tmp_path / "second/checkpoints").glob("*.pt")):
        if "step-00000003" not in path.name:
            path.unlink()
    os.rename(tmp_path / "first", tmp_path / "moved")
    resumed, weights, averages = train(tmp_path / "second", *settings)
    assert resumed.resumed_from is not None
    assert run_info(resumed)["initialised_from"] is None
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
    with pytest.raises(UserError, match=r"made with other settings: checkpoint.init_from \(was "):
        train(tmp_path / "second", "train.ema_decay=0.9")


@pytest.mark.parametrize("wrap", [dict, lambda w: {"model": w}, lambda w: {"state_dict": w, "epoch": 3}])
def test_saved_state_dicts(tmp_path, wrap):
    net = Net()
    torch.save(wrap({f"module.{name}": value for name, value in net.state_dict().items()}), tmp_path / "w.pt")
    assert_same(read_weights(tmp_path / "w.pt", tmp_path / "w.pt"), net.state_dict())


def test_what_does_not_fit_keeps_its_initial_values_and_is_listed_once(tmp_path, capsys):
    other, net = Net(), Net()
    other.fc3 = torch.nn.Linear(84, 100)
    other.extra = torch.nn.Linear(1, 1, bias=False)
    del other.conv1
    torch.save(other.state_dict(), tmp_path / "w.pt")
    start = {name: value.clone() for name, value in net.state_dict().items()}
    load_initial_weights(net, tmp_path / "w.pt")
    for name, value in net.state_dict().items():
        fits = name.startswith(("conv2", "fc1", "fc2"))
        assert torch.equal(value, (other.state_dict() if fits else start)[name]), name
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"distlenet: checkpoint.init_from={tmp_path / 'w.pt'}: 6 of the model's 10 tensors are loaded; missing: "
        "conv1.weight, conv1.bias; unexpected: extra.weight; of another shape: fc3.weight [100, 84] for [10, 84], "
        "fc3.bias [100] for [10]"
    )


def test_long_lists_are_shortened(tmp_path, capsys):
    torch.save(Net().state_dict() | {f"x{i}": torch.zeros(1) for i in range(25)}, tmp_path / "w.pt")
    load_initial_weights(Net(), tmp_path / "w.pt")
    assert capsys.readouterr().err.endswith("x19 and 5 more\n")


class Payload:
    def __reduce__(self):
        return (open, ("payload-ran", "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.weight": torch.zeros(2)}, "no tensor has the name and the shape.*it has a.weight; the model has conv1.w"),
        ({"conv1.weight": torch.zeros(2)}, "no tensor has the name and the shape"),
        ({}, "no tensor has .* it has no tensors; "),
        ([torch.zeros(1)], "is a list, not a state_dict"),
        ({"conv1.weight": 3}, "is a dict, not a state_dict"),
        (Payload(), r"cannot be read: torch.load refuses it \(UnpicklingError\)"),
    ],
)
def test_files_without_weights_of_the_model(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    with pytest.raises(UserError, match=f"^checkpoint.init_from={tmp_path / 'w.pt'}: {message}"):
        load_initial_weights(Net(), tmp_path / "w.pt")
    assert not (tmp_path / "payload-ran").exists()


def test_damaged_checkpoint_and_missing_file(tmp_path):
    path = tmp_path / "c.pt"
    write_atomically(lenet_state(1), path)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="do not match its checksum"):
        load_initial_weights(Net(), path)
    with pytest.raises(UserError, match=r"none\.pt: no such file or directory"):
        load_initial_weights(Net(), tmp_path / "none.pt")
