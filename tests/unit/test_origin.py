"""A run is not resumed with other data or other code of the user."""

import pytest
import torch
from forked import run_python

from distlenet import Datasets, load_config
from distlenet.training.origin import Origin, check_origin
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

TASK = """
import torch
from torch import nn

from distlenet import Datasets, Task
from {helper} import WEIGHT


class Slope(Task):
    def __init__(self, config, length=8):
        super().__init__(config)
        self.length = length

    def model(self):
        return nn.Linear(1, 1)

    def datasets(self):
        samples = [(torch.tensor([float(x)]), torch.tensor([3.0 * x])) for x in range(self.length)]
        return Datasets(samples, samples[:4])

    def loss(self, model, data):
        outputs = model(data[0])
        return WEIGHT * ((outputs - data[1]) ** 2).sum(1), outputs
"""

SETTINGS = ("device=cpu", "train.global_batch_size=4", "optim.lr=0.001", "train.epochs=2", "run.name=run")


@pytest.fixture
def modules(tmp_path):
    """The files of a task and of a module that it imports, with names that no other test has."""
    task, helper = tmp_path / f"task_{tmp_path.name}.py", tmp_path / f"helper_{tmp_path.name}.py"
    task.write_text(TASK.format(helper=helper.stem))
    helper.write_text("WEIGHT = 1.0\n")
    return task, helper


def start(task, *settings):
    words = ("-m", "distlenet.train", *SETTINGS, f"task.name={task.stem}:Slope", *settings)
    return run_python(*words, cwd=task.parent)


def test_changed_code_and_data_are_named(modules):
    task, helper = modules
    start(task).succeeded()
    assert "this run is complete" in start(task).succeeded().stdout

    helper.write_text("WEIGHT = 2.0\n")
    ran = start(task)
    assert ran.status == 2
    assert f"the code is not that of the checkpoint: {helper.stem} (" in ran.stderr
    assert "checkpoint.allow_changed=[code] to resume anyway" in ran.stderr
    start(task, "checkpoint.allow_changed=[code]").succeeded()

    helper.write_text("WEIGHT = 1.0\n")
    task.write_text(task.read_text().replace("3.0 * x", "4.0 * x"))
    ran = start(task, "checkpoint.allow_changed=[code]")
    assert ran.status == 2
    assert "the data is not that of the checkpoint: train (8 samples" in ran.stderr
    start(task, "checkpoint.allow_changed=[code,data]").succeeded()


def test_data_is_not_changed_inside_an_epoch():
    origin, config = Origin({"train": "2 samples"}, {}), load_config([], ["checkpoint.allow_changed=[data]"])
    saved = {"data": {"train": "1 samples"}, "code": {}}
    check_origin(saved, origin, config, batch=0)
    check_origin(origin.to_dict(), origin, load_config(), batch=3)
    with pytest.raises(UserError, match=r"3 batches into an epoch"):
        check_origin(saved, origin, config, batch=3)


def test_the_digest_depends_on_samples_and_classes_and_not_on_random_state():
    from distlenet.task import Task
    from distlenet.training.origin import _data_digests

    class Noisy(list):
        def __getitem__(self, index):
            return super().__getitem__(index) + torch.rand(2)

    class Plain(Task):
        def model(self): ...
        def datasets(self): ...
        def loss(self, model, data): ...

    config = load_config()

    def digests(values, classes=("a",)):
        data = Noisy(torch.tensor(values).unbind())
        return _data_digests(config, Plain(config), Datasets(data, data, classes=classes))

    first = digests([1.0, 2.0])
    torch.rand(3)
    assert digests([1.0, 2.0]) == first
    assert digests([1.0, 2.5])["train"] != first["train"]
    assert digests([1.0, 2.0], ("b",))["classes"] != first["classes"]
