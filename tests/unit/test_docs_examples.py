"""The examples of docs/tasks.md run, keep the contract of a task, and compute what they claim."""

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from torch import Tensor, nn

from distlenet.config.loading import load_config
from distlenet.task import SampleKeys, Task

pytestmark = pytest.mark.unit

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAMPLES = torch.arange(40)


@cache
def examples() -> dict[str, type[Task]]:
    """Run each block of the page separately, and return the tasks that they define, by name."""
    tasks: dict[str, type[Task]] = {}
    for code in BLOCK.findall((REPO / "docs/tasks.md").read_text()):
        names: dict = {"__name__": "my_tasks"}
        exec(compile(code, "docs/tasks.md", "exec"), names)
        tasks |= {k: v for k, v in names.items() if getattr(v, "__module__", "") == "my_tasks" and issubclass(v, Task)}
    return tasks


def compute(name: str, count: int = len(SAMPLES)) -> tuple[Task, nn.Module, Tensor, Tensor | None, Tensor, tuple]:
    """Return task, model, losses, weights, outputs and data of some samples of the training set, in training mode."""
    torch.manual_seed(0)
    task = examples()[name](load_config([], ["data.name=digits", "device=cpu", "train.label_smoothing=0"]))
    indices = SAMPLES[:count]
    data = task.transform(task.datasets().train.get_batch(indices), SampleKeys(0, 0, indices))
    model = task.model()
    losses, outputs = task.loss(model, data)
    losses, weights = losses if isinstance(losses, tuple) else (losses, None)
    return task, model, losses, weights, outputs, data


@pytest.mark.parametrize("name", ["TopK", "Focal", "Odd", "Properties", "NextWord", "OneAgainstAll", "Erased"])
def test_example_returns_one_value_per_sample(name):
    assert name in examples()
    task, _, losses, weights, outputs, data = compute(name)
    values = {"loss": losses, **task.metrics(outputs, data), **({} if weights is None else {"weights": weights})}
    for value in values.values():
        assert value.shape == (40,)
        assert torch.isfinite(value.double()).all()
    assert losses.requires_grad
    one = compute(name, 1)[2]  # a batch of other samples: float32 sums of up to 784 products
    torch.testing.assert_close(one, losses[:1], rtol=1e-4, atol=1e-5)


def test_no_example_is_left_out():
    assert len(examples()) == 7


def test_top_k_counts_the_label_among_the_k_largest():
    task, _, _, _, outputs, data = compute("TopK")
    expected = [int(label) in row.argsort(descending=True)[:5] for row, label in zip(outputs, data[1], strict=True)]
    assert task.metrics(outputs, data)["top5"].tolist() == expected
    assert 0 < sum(expected) < 40


def test_focal_loss_is_weighted_cross_entropy():
    _, _, losses, _, logits, (_, labels) = compute("Focal")
    probability = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(losses, (1 - probability) ** 2 * -probability.log())


def test_mean_over_properties_and_the_share_of_right_ones():
    task, _, losses, _, logits, data = compute("Properties")
    label = data[1][3].item()
    targets = torch.tensor([label % 2 == 1, label >= 5, label % 3 == 0]).float()
    torch.testing.assert_close(losses[3], F.binary_cross_entropy_with_logits(logits[3], targets))
    metrics = task.metrics(logits, data)
    assert float(metrics["accuracy"][3]) == pytest.approx(float(((logits[3] > 0) == targets.bool()).float().mean()))
    assert torch.equal(metrics["all"], metrics["accuracy"] == 1)


def test_weighted_mean_is_the_mean_over_tokens():
    _, model, losses, weights, logits, words = compute("NextWord")
    tokens = words > 0
    expected = F.cross_entropy(logits[tokens], words[tokens])
    torch.testing.assert_close((losses * weights).sum() / weights.sum(), expected)
    assert abs(float(losses.detach().mean() - expected.detach())) > 1e-3  # the mean over sentences is another number
    torch.testing.assert_close(logits[:, 1], model(words[:, 0]))


def test_area_under_the_curve_is_the_share_of_ordered_pairs():
    task, _, _, _, outputs, data = compute("OneAgainstAll")
    predictions = task.prediction(outputs, data)
    auc = task.summary_metrics(predictions)["auc"]
    scores, positive = predictions["score"].tolist(), predictions["positive"].tolist()
    rows = list(zip(scores, positive, strict=True))
    pairs = [(a, b) for a, first in rows for b, second in rows if first and not second]
    assert auc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))


def test_rows_are_erased_in_training_only():
    task, *_, (inputs, _) = compute("Erased")
    plain, _ = task.transform(task.datasets().train.get_batch(SAMPLES), None)
    changed = (inputs - plain).abs()
    assert float(changed.max()) > 0.5
    assert float(changed.median()) < 0.1  # the noise, of standard deviation 0.1: its median is 0.067
