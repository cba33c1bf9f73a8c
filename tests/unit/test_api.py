"""The Python API: a trained network that takes raw samples."""

import pytest
import torch
from torch import nn

from distlenet import Datasets, ImageClassification, Task, UserError, evaluate, load_config, load_model, train
from distlenet.data.sources import load_data
from distlenet.serving.predictor import Predictor

pytestmark = pytest.mark.unit

SETTINGS = ("device=cpu", "train.max_steps=3", "train.epochs=1", "run.name=run", "run.console=auto")


class OwnNet(ImageClassification):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, len(self.classes)))


class Slope(Task):
    """Fits y = 3x with one weight."""

    def __init__(self, config, slope=3.0):
        super().__init__(config)
        self.slope = slope

    def model(self):
        return nn.Linear(1, 1, bias=False)

    def datasets(self):
        samples = [(torch.tensor([float(x)]), torch.tensor([self.slope * x])) for x in range(8)]
        return Datasets(samples, samples)

    def loss(self, model, data):
        outputs = model(data[0])
        return ((outputs - data[1]) ** 2).sum(1), outputs


def run(tmp_path, task, *settings):
    config = load_config([], [*SETTINGS, f"run.dir={tmp_path}", *settings])
    return train(config, make_task=task)


def test_a_loaded_model_takes_raw_images_without_the_data(tmp_path):
    run(tmp_path, OwnNet, "data.name=digits")
    images = load_data(load_config([], ["data.name=digits"]).data).test.images[:5]
    with torch.no_grad():
        net = load_model(tmp_path / "run", OwnNet)
        logits = net(images)
    assert (logits.shape, net.training, net.task.data) == ((5, 10), False, None)
    mean, std = net.task.images.mean[0], net.task.images.std[0]
    expected = net.model((images.float() - mean).div(std).unsqueeze(1))
    assert torch.equal(logits, expected)


def test_a_loaded_built_in_model_predicts_as_the_command(tmp_path):
    run(tmp_path, ImageClassification, "data.name=digits")
    images = load_data(load_config([], ["data.name=digits"]).data).test.images[:5]
    with torch.no_grad():
        probabilities = load_model(str(tmp_path / "run"))(images).softmax(1)
    assert torch.equal(probabilities, Predictor(tmp_path / "run")(images))


def test_a_task_that_is_no_classification_of_images(tmp_path):
    run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    net = load_model(tmp_path / "run", Slope)
    x = torch.tensor([[2.0]])
    assert torch.equal(net((x, x)), net.model(x))


def test_evaluate_returns_the_metrics_of_the_training(tmp_path):
    summary = run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    result = evaluate(tmp_path / "run", make_task=Slope)
    assert (result["step"], result["test_count"]) == (2, 8)
    assert result["test_loss"] == summary["test_loss"] > 0


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    run(tmp_path, ImageClassification, "data.name=digits")
    with pytest.raises(UserError, match=r"is of another architecture than Linear"):
        load_model(tmp_path / "run", Slope)
    run(tmp_path, Slope, "run.name=slope")
    with pytest.raises(UserError, match=r"its task state is not one of ImageClassification"):
        load_model(tmp_path / "slope")


def test_a_class_receives_the_arguments_of_the_task(tmp_path):
    """With slope 0, an untrained network with a weight in [-1, 1] has a loss of at most x², whose mean is 17.5."""
    small = ["train.global_batch_size=4", "optim.lr=0.0001", "task.args.slope=0"]
    summary = run(tmp_path, Slope, *small)
    assert summary["test_loss"] < 17.5
    assert evaluate(tmp_path / "run", make_task=Slope)["test_loss"] == summary["test_loss"]
    assert load_model(tmp_path / "run", Slope).task.slope == 0
    assert evaluate(tmp_path / "run", ["task.args.slope=50"], make_task=Slope)["test_loss"] > 10_000
    with pytest.raises(UserError, match=r"task.args: Slope: got an unexpected keyword argument 'angle'.*slope=3.0"):
        run(tmp_path, Slope, "task.args={angle: 1}")
