"""``model.compile`` without a compiler: the backend ``eager`` traces the model, and runs what it traced."""

from contextlib import closing

import pytest
import torch
from torch import nn

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training import compilation
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

SETTINGS = ("data.name=digits", "device=cpu", "train.epochs=1", "train.max_steps=12", "train.check_replicas_every=1")


def train(run_dir, *settings):
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    config = load_config([], [*SETTINGS, *settings, f"run.dir={run_dir.parent}", f"run.name={run_dir.name}"])
    with (
        init_distributed(config) as context,
        closing(Trainer(config, context, ImageClassification(config), run_dir, Trackers(), Preemption(1.0))) as trainer,
    ):
        trainer.fit()
    return trainer


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_steps_are_compiled_for_each_shape_and_names_and_evaluation_stay(tmp_path, monkeypatch, reduction):
    """The traced operations are those of the model: the bits are the same. The last batch of the epoch is short."""
    shapes = []

    def backend(graph, inputs):
        shapes.append([i.shape[0] for i in inputs if i.shape[1:] == (1, 32, 32)])
        return graph

    monkeypatch.setattr(compilation, "BACKEND", backend)
    settings = (f"distributed.reduction={reduction}", "distributed.virtual_shards=1")
    compiled = train(tmp_path / "compiled", *settings, "model.compile=true")
    assert shapes == [[], [128], [29]]  # the first is the trial; the evaluation is not compiled
    eager = train(tmp_path / "eager", *settings)
    state = load_checkpoint(find_checkpoint(tmp_path / "compiled"))["model"]
    assert compiled.state.test == eager.state.test
    assert list(state) == list(eager.model.state_dict())
    for name, value in eager.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_machine_that_cannot_compile(tmp_path, monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nmore of it")

    monkeypatch.setattr(compilation, "BACKEND", refuse)
    with pytest.raises(UserError, match=r"^model\.compile=true: torch\.compile does not work here .*install a C\+\+"):
        train(tmp_path / "run", "model.compile=true")


def test_more_shapes_than_the_limit_are_an_error(monkeypatch):
    """Otherwise torch would run the model eagerly from then on, with other bits than a resumed run."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "MAX_SHAPES", 3)
    config = load_config([], ["device=cpu"])
    with init_distributed(config):
        model = compilation.compile_model(nn.Linear(2, 1), torch.device("cpu"))
        for size in range(1, 4):
            model(torch.zeros(size, 2))
        with pytest.raises(Exception, match="recompile"):
            model(torch.zeros(9, 2))
