"""The parameter groups of a task, from the check of its answer to the steps of the optimizer."""

from contextlib import closing

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.parameter_groups import parameter_groups
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "device=cpu", "optim.weight_decay=0.1", "optim.lr=0.1", "train.max_steps=14")


def task_with_groups(groups, *settings):
    class Grouped(ImageClassification):
        def parameter_groups(self, model):
            return groups(model)

    return Grouped(load_config([], [*SETTINGS, *settings]))


def train(tmp_path, task):
    """Train 14 steps; return the trainer."""
    (tmp_path / "checkpoints").mkdir(parents=True, exist_ok=True)
    with (
        init_distributed(task.config) as context,
        closing(Trainer(task.config, context, task, tmp_path, Trackers(), Preemption(1.0))) as trainer,
    ):
        trainer.fit()
    return trainer


def test_default_is_one_group_and_no_decay_splits_off_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].weight.requires_grad_(False)
    (group,) = parameter_groups(ImageClassification(load_config([], SETTINGS)), model)
    assert group.keys() == {"params"}
    assert [p.shape for p in group["params"]] == [(3, 2), (3,), (3,), (3,), (1,)]  # not the frozen one
    task = ImageClassification(load_config([], [*SETTINGS, "optim.no_decay=true"]))
    decayed, rest = parameter_groups(task, model)
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert rest["weight_decay"] == 0
    assert len(rest["params"]) == 4
    assert len(parameter_groups(task, torch.nn.Linear(2, 3, bias=False))) == 1  # no empty group


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [{"params": [m.weight]}], "Grouped.parameter_groups: bias is in no group; each"),
        (lambda m: [{"params": [m.weight]}, {"params": m.parameters()}], "weight is in 2 places; each"),
        (lambda m: [{"params": [*m.parameters(), torch.nn.Parameter(torch.zeros(2))]}], "has 1 parameters that are"),
        (lambda m: list(m.parameters()), "expected a list of dicts with params"),
        (lambda _: [{"lr": 1.0}], "expected a list of dicts with params"),
    ],
)
def test_each_trainable_parameter_is_in_one_group(groups, message):
    with pytest.raises(UserError, match=message):
        parameter_groups(task_with_groups(groups), torch.nn.Linear(2, 2))


def test_weight_decay_shrinks_weights_but_not_biases(tmp_path):
    """Two runs with another weight decay: only through the weights do the biases differ, so the loss gradient is 0."""

    class NoLoss(ImageClassification):
        def loss(self, model, data):
            losses, outputs = super().loss(model, data)
            return losses * 0, outputs

    config = load_config([], [*SETTINGS, "optim.no_decay=true", "optim.schedule=constant", "optim.momentum=0.9"])
    torch.manual_seed(config.seed)
    start = ImageClassification(config).model().state_dict()
    trained = train(tmp_path, NoLoss(config)).model.state_dict()
    for name, value in start.items():
        if value.dim() > 1:
            assert trained[name].norm() < 0.95 * value.norm(), name
        else:
            assert torch.equal(trained[name], value), name


def two_rates(model):
    last = list(model.fc3.parameters())
    others = [p for name, p in model.named_parameters() if not name.startswith("fc3")]
    return [{"params": others, "lr": 0.0}, {"params": last}]


def test_the_schedule_multiplies_the_rate_of_each_group(tmp_path):
    task = task_with_groups(two_rates, "optim.schedule=cosine", f"run.dir={tmp_path}", "train.max_grad_norm=1")
    torch.manual_seed(task.config.seed)
    start = task.model().state_dict()
    for name, value in train(tmp_path, task).model.state_dict().items():
        assert torch.equal(value, start[name]) == (not name.startswith("fc3")), name


def test_groups_resume(tmp_path):
    settings = (f"run.dir={tmp_path}", "optim.schedule=cosine", "checkpoint.every_steps=5")
    whole = train(tmp_path / "whole", task_with_groups(two_rates, *settings))
    train(tmp_path / "run", task_with_groups(two_rates, *settings, "train.max_steps=7"))
    resumed = task_with_groups(two_rates, *settings, "checkpoint.allow_changed=[train.max_steps]")
    assert train(tmp_path / "run", resumed).resumed_from is not None
    assert whole.train_step.on_device.optimizer.param_groups[0]["lr"] == 0
    one = task_with_groups(lambda m: [{"params": list(m.parameters())}], *settings)
    with pytest.raises(UserError, match=r"param_groups are of the parameters"):
        train(tmp_path / "whole", one)
