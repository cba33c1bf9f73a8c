"""A user's task with other data, another loss and other metrics runs through the step and the evaluation."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from loaders import make_evaluation_loader, make_loader
from torch import Tensor, nn

from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.data.loader import Loader
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.task import Datasets, Task
from distlenet.training.evaluation import evaluate
from distlenet.training.train_step import TrainStep

pytestmark = pytest.mark.unit

BATCH_SIZE = 8
SETTINGS = ("device=cpu", f"train.global_batch_size={BATCH_SIZE}", "optim.lr=0.05", "optim.schedule=constant")
REDUCTIONS = [
    ("distributed.reduction=ddp", "train.accumulation_steps=3", "distributed.allow_uneven_batches=true"),
    ("distributed.reduction=exact", "distributed.virtual_shards=4"),
]


class Sentences:
    """Samples with a ragged part: word numbers, of another length in each sample; a tensor; and the score to learn."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 6, (samples,), generator=generator).tolist()
        self.words = [torch.randint(0, 20, (length,), generator=generator) for length in lengths]
        self.features = torch.randn(samples, 3, generator=generator)
        self.scores = torch.randn(samples, generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def get_batch(self, indices: Tensor) -> dict:
        words = [self.words[index] for index in indices.tolist()]
        return {"words": words, "sample": {"features": self.features[indices], "score": self.scores[indices]}}


class Scorer(nn.Module):
    """The mean of the words' embeddings and the features, mapped to a score."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4)
        self.linear = nn.Linear(7, 1)

    def forward(self, words: list[Tensor], features: Tensor) -> Tensor:
        lengths = torch.tensor([len(sentence) for sentence in words], dtype=torch.int64)
        owners = torch.arange(len(words)).repeat_interleave(lengths)
        embedded = self.embedding(torch.cat([*words, torch.zeros(0, dtype=torch.int64)]))
        sums = torch.zeros(len(words), 4).index_add(0, owners, embedded)
        means = sums / lengths.clamp(min=1).unsqueeze(1)
        return self.linear(torch.cat([means, features], 1)).squeeze(1)


class Scoring(Task):
    """Regression: the loss is the squared error."""

    eval_batch_size = 5

    def model(self) -> nn.Module:
        return Scorer()

    def datasets(self) -> Datasets:
        return Datasets(Sentences(20, seed=1), Sentences(13, seed=2), source="generated")

    def transform(self, data, keys):
        """Flip the sign of the features of random samples, in training only."""
        sample = data["sample"]
        if keys is None:
            return data
        signs = 1.0 - 2.0 * (keys.bits() & 1)
        return {**data, "sample": {**sample, "features": sample["features"] * signs.unsqueeze(1)}}

    def loss(self, model, data):
        scores = model(data["words"], data["sample"]["features"])
        return (scores - data["sample"]["score"]) ** 2, {"score": scores}

    def metrics(self, outputs, data):
        assert not outputs["score"].requires_grad
        error = (outputs["score"] - data["sample"]["score"]).abs()
        return {"absolute_error": error, "close": error < 1}


class WeightedScoring(Scoring):
    """The loss is weighted by the number of words."""

    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return (losses, torch.tensor([float(len(words)) for words in data["words"]])), outputs


TASK = Scoring(Config())


@contextmanager
def make_step(*reduction: str, task: Task = TASK) -> Iterator[tuple[TrainStep, Loader, DistributedContext, Config]]:
    config = load_config([], [*SETTINGS, *reduction])
    with init_distributed(config) as context:
        dataset = TASK.datasets().train
        loader = make_loader(dataset, BATCH_SIZE, seed=config.seed, device=context.device)
        sample = loader.sample_batch()
        example = TASK.transform(sample.data, sample.keys)
        train_step = TrainStep(config, context, task, 100, example, BATCH_SIZE)
        train_step.warm_up()
        yield train_step, loader, context, config


def reference_losses(model, batch):
    return TASK.loss(model, TASK.transform(batch.data, batch.keys))


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=["ddp", "exact"])
def test_steps_equal_plain_training(reduction):
    """Batches of 8, 8 and 4 samples, in micro-batches: the same weights as with the mean loss of a batch at once."""
    with make_step(*reduction) as (train_step, loader, _, config):
        reference = copy.deepcopy(train_step.on_device.model)
        options = {"lr": 0.05, "momentum": config.optim.momentum, "nesterov": config.optim.nesterov}
        optimizer = torch.optim.SGD(reference.parameters(), **options, weight_decay=config.optim.weight_decay)
        squared, absolute, close = [], [], []
        for step, batch in enumerate(loader.epoch(0)):
            result = train_step(batch, step, stop=False, want_grad_norm=True)
            assert (result.skipped, result.stop, result.lr) == (False, False, 0.05)
            losses, outputs = reference_losses(reference, batch)
            losses.mean().backward()
            # Float32, as below.
            norm = nn.utils.get_total_norm([p.grad for p in reference.parameters()])
            torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=1e-6)
            optimizer.step()
            optimizer.zero_grad()
            error = (outputs["score"] - batch.data["sample"]["score"]).abs()
            squared, absolute = squared + losses.tolist(), absolute + error.tolist()
            close += (error < 1).tolist()
        for ours, expected in zip(train_step.on_device.model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # three steps of float32, 6e-8 each
        metrics = train_step.on_device.meter.total()
        assert metrics.count == 20
        assert list(metrics.means) == ["loss", "absolute_error", "close"]
        expected = [sum(values) / 20 for values in (squared, absolute, close)]
        assert list(metrics.means.values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=["ddp", "exact"])
def test_recomputed_step_lists_each_sample(reduction):
    """The report on a failed step needs each sample's loss, in the order of the batch's indices."""
    with make_step(*reduction) as (train_step, loader, *_):
        for number in (0, 2):
            batch = loader.batch(0, number)
            losses, weights, gradients = train_step.on_device.recompute(batch, step=number)
            assert weights is None
            expected, _ = reference_losses(train_step.on_device.model, batch)
            torch.testing.assert_close(losses, expected.detach())
            expected.mean().backward()
            for name, parameter in train_step.on_device.model.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
            train_step.on_device.model.zero_grad()


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=["ddp", "exact"])
def test_weighted_steps_equal_plain_training(reduction):
    with make_step(*reduction, task=WeightedScoring(Config())) as (train_step, loader, context, _):
        model = train_step.on_device.model
        reference = copy.deepcopy(model)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        totals = []
        for step, batch in enumerate(loader.epoch(0)):
            train_step(batch, step, stop=False)
            losses, outputs = reference_losses(reference, batch)
            weights = torch.tensor([float(len(words)) for words in batch.data["words"]])
            ((weights * losses).sum() / weights.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            totals.append(torch.stack([weights, weights * losses.detach(), _errors(outputs, batch)], 1))
        for ours, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # as above
        weight, loss, error = torch.cat(totals).double().sum(0).tolist()
        means = train_step.on_device.meter.total().means
        assert [means["loss"], means["absolute_error"]] == pytest.approx([loss / weight, error / 20], rel=1e-4)
        test = TASK.datasets().test
        evaluation = make_evaluation_loader(test, TASK.eval_batch_size, device=context.device)
        metrics = evaluate(train_step.on_device.outline, model, evaluation, len(test), context)
        losses = (model(test.words, test.features) - test.scores).detach().double() ** 2
        weights = torch.tensor([len(words) for words in test.words])
        assert metrics.means["loss"] == pytest.approx(float((weights * losses).sum() / weights.sum()), abs=2e-6)


def _errors(outputs, batch):
    return (outputs["score"] - batch.data["sample"]["score"]).abs().detach()


def test_evaluation_equals_means_over_the_set():
    with make_step(*REDUCTIONS[0]) as (train_step, _, context, _):
        test, model = TASK.datasets().test, train_step.on_device.model
        loader = make_evaluation_loader(test, TASK.eval_batch_size, device=context.device)
        metrics = evaluate(train_step.on_device.outline, model, loader, len(test), context)
        error = (model(test.words, test.features) - test.scores).detach()
    assert metrics.count == 13
    expected = {"loss": error**2, "absolute_error": error.abs(), "close": error.abs() < 1}
    # The grid of the sums is 2**-20, 1e-6.
    assert metrics.means == pytest.approx({name: float(x.double().mean()) for name, x in expected.items()}, abs=2e-6)
