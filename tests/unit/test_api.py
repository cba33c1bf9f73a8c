"""The Python API: a trained network that takes raw samples."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distlenet import Datasets, ImageClassification, Task, UserError, evaluate, load_config, load_model, train
from distlenet.data.sources import load_data
from distlenet.inference.predictor import Predictor

pytestmark = pytest.mark.unit

SETTINGS = ("device=cpu", "train.max_steps=3", "train.epochs=1", "run.name=run", "run.console=auto")


class OwnNet(ImageClassification):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, len(self.classes)))


class Inverted(OwnNet):
    """A transform that differs from the built-in one, also in an evaluation."""

    def transform(self, data, keys):
        inputs, labels = super().transform(data, keys)
        return -inputs, labels


class Sigmoid(OwnNet):
    """Several labels per image."""

    def postprocess(self, outputs):
        return outputs.sigmoid()


class OddOrEven(ImageClassification):
    """One output per image."""

    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(1024, 1), nn.Flatten(0))

    def loss(self, model, data):
        outputs = model(data[0])
        return (outputs - data[1] % 2) ** 2, outputs

    def metrics(self, outputs, data):
        return {}

    def error_analysis(self, device):
        return None


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


def test_the_command_predicts_with_the_task_that_was_trained(tmp_path):
    run(tmp_path, Inverted, "data.name=digits")
    images = load_data(load_config([], ["data.name=digits"]).data).test.images[:5]
    with torch.no_grad():
        logits = load_model(tmp_path / "run", Inverted)(images)
        assert not torch.allclose(logits, load_model(tmp_path / "run", OwnNet)(images))
        plain = load_model(tmp_path / "run", Sigmoid)(images)
    assert torch.equal(Predictor(tmp_path / "run", [f"task.name={__name__}:Inverted"])(images), logits.softmax(1))
    assert torch.equal(Predictor(tmp_path / "run", [f"task.name={__name__}:Sigmoid"])(images), plain.sigmoid())
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"task:\n  name: {__name__}:Inverted\n")
    assert torch.equal(Predictor(tmp_path / "run", files=[str(settings)])(images), logits.softmax(1))


def test_the_command_refuses_what_has_no_output_per_class(tmp_path):
    run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    with pytest.raises(UserError, match=r"Slope: is not an ImageClassification; predict from Python, .*load_model"):
        Predictor(tmp_path / "run", [f"task.name={__name__}:Slope"])
    run(tmp_path, OddOrEven, "data.name=digits", "run.name=odd")
    with pytest.raises(UserError, match=r"OddOrEven.predict: returned outputs of shape \[1\] for 1 images"):
        Predictor(tmp_path / "odd", [f"task.name={__name__}:OddOrEven"])


def test_an_error_analysis_of_other_outputs_is_refused_before_the_training(tmp_path):
    task = type("Analysed", (OddOrEven,), {"error_analysis": ImageClassification.error_analysis})
    with pytest.raises(
        UserError, match=r"Analysed.error_analysis: does not accept .*expected outputs \(n, 10\).*got \[1\]"
    ):
        run(tmp_path, task, "data.name=digits")


def test_a_task_that_is_no_classification_of_images(tmp_path):
    run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    net = load_model(tmp_path / "run", Slope)
    x = torch.tensor([[2.0]])
    assert torch.equal(net((x, x)), net.model(x))
    with pytest.raises(UserError, match=r"Slope.predict: the default needs targets \(.*Error.*define Slope.predict"):
        net(x)
    own = type("Own", (Slope,), {"predict": lambda *_: int("x")})
    with pytest.raises(ValueError, match="invalid literal"):
        load_model(tmp_path / "run", own)(x)


def test_datasets_other_than_two_need_names():
    with pytest.raises(TypeError, match="positional"):
        Datasets([], [], [])


def test_an_empty_set_is_refused(tmp_path):
    samples = [(torch.ones(1), torch.ones(1))]
    for validation, test, name in (([], samples, "validation"), (None, [], "test")):
        task = type("Empty", (Slope,), {"datasets": lambda _, v=validation, t=test: Datasets(samples, t, validation=v)})
        with pytest.raises(UserError, match=rf"Empty\.datasets: the {name} set has no samples"):
            run(tmp_path, task, "train.global_batch_size=1")


def test_evaluate_returns_the_metrics_of_the_training(tmp_path):
    summary = run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    result = evaluate(tmp_path / "run", make_task=Slope)
    assert (result["step"], result["test_count"]) == (2, 8)
    assert result["test_loss"] == summary["test_loss"] > 0


def test_evaluate_pickles_no_large_tensor_to_send_it(tmp_path, monkeypatch):
    """The weights and the state of the optimizer are 12 MB."""

    class Large(Slope):
        def model(self):
            return nn.Sequential(nn.Linear(1, 500_000), nn.Linear(500_000, 1))

    run(tmp_path, Large, "train.global_batch_size=4", "optim.lr=1e-9")
    sent = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, **_: sent.append(len(pickle.dumps(values))))
    evaluate(tmp_path / "run", make_task=Large)
    assert 0 < max(sent) < 10**6


def test_evaluate_builds_no_cache(tmp_path):
    run(tmp_path, Slope, "train.global_batch_size=4", "optim.lr=0.001")
    configs = []
    evaluate(tmp_path / "run", make_task=lambda config: configs.append(config) or Slope(config))
    assert [config.data.build_cache for config in configs] == [False]


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    run(tmp_path, ImageClassification, "data.name=digits")
    with pytest.raises(UserError, match=r"is of another architecture than Linear"):
        load_model(tmp_path / "run", Slope)
    run(tmp_path, Slope, "run.name=slope")
    with pytest.raises(UserError, match=r"its task state does not fit ImageClassification"):
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
