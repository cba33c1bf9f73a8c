"""Print, as JSON, what a replayed step costs: ``FILE SETTING...``. Benchmarks and tests read it.

Nodes of the graph, and of that of a bare step (forward, loss, backward and optimizer on fixed tensors); and per step,
between two log points: launches and copies outside of the graph, host syncs, and microseconds of the host.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.models.lenet import Net
from distlenet.task import Data
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer
from fake_cuda import runtime
from fake_cuda.mode import paused

SETTINGS = (
    "device=cuda",
    "data.name=synthetic",
    "data.synthetic_train=60000",
    "data.synthetic_test=100",
    "train.global_batch_size=128",
    "train.epochs=100",
    "train.log_every=1000000",
    "checkpoint.resume=never",
)
WARM_UP, STEPS, TURNS = 6, 64, 40


class Marked(ImageClassification):
    """Notes how many nodes a capture has at some points of a step."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.marks: dict[str, int] = {}

    def mark(self, name: str) -> None:
        self.marks[name] = runtime.counts().get("node", 0)

    def loss(self, model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
        self.mark("gather")
        result = super().loss(model, data)
        self.mark("loss")
        return result

    def metrics(self, outputs: Tensor, data: Data) -> dict[str, Tensor]:
        self.mark("sum and backward")
        return super().metrics(outputs, data)


PHASES = (
    "gather",
    "forward",
    "loss",
    "sum and backward",
    "metrics and all-reduce",
    "flags",
    "keep metrics",
    "optimizer",
)


def mark_calls(trainer: Trainer, task: Marked) -> None:
    """Let ``task`` note the nodes when the parts of a step end that are not part of the task."""
    step = trainer.train_step.on_device
    assert step.flags is not None
    record, update = step.flags.record, step.meter.update

    def record_and_mark(*args: Any) -> None:
        task.mark("metrics and all-reduce")
        record(*args)
        task.mark("flags")

    def update_and_mark(*args: Any) -> None:
        update(*args)
        task.mark("keep metrics")

    step.flags.record, step.meter.update = record_and_mark, update_and_mark
    step.model.register_forward_hook(lambda *_: task.mark("forward"))
    step.optimizer.register_step_post_hook(lambda *_: task.mark("optimizer"))


def nodes_by_phase(task: Marked) -> dict[str, int]:
    """Return the nodes of the last capture, by phase."""
    ends = [task.marks[phase] for phase in PHASES]
    return {phase: end - begin for phase, begin, end in zip(PHASES, [0, *ends], ends, strict=False)}


def bare_nodes(batch_size: int, precision: str) -> int:
    """Return the number of nodes of a captured step without an engine."""
    model = Net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
    images = torch.zeros(batch_size, 1, 32, 32, device="cuda")
    labels = torch.zeros(batch_size, dtype=torch.int64, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    return len(runtime.nodes())


def take(trainer: Trainer) -> Iterator[None]:
    """Take steps forever, as ``Trainer.train_epoch`` does between two log points."""
    epoch = 0
    while True:
        trainer.state = replace(trainer.state, epoch=epoch, batch=0)
        for batch in trainer.throughput.time_loading(trainer.loader.epoch(epoch)):
            trainer.step(batch)
            yield
        epoch += 1


def host_us(steps: Iterator[None]) -> list[float]:
    """Return the lowest time of the host and the median, in microseconds, of turns of steps."""
    times = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        for _ in range(STEPS):
            next(steps)
        times.append(1e6 * (time.perf_counter() - begin) / STEPS)
    return [min(times), statistics.median(times)]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = load_config([], [*SETTINGS, *sys.argv[1:], f"run.dir={directory}"])
        (Path(directory) / "run/checkpoints").mkdir(parents=True)
        with init_distributed(config) as context:
            task, preemption = Marked(config), Preemption(1.0)
            trainer = Trainer(config, context, task, Path(directory) / "run", Trackers(), preemption)
            with closing(trainer):
                trainer.train_step.warm_up()
                graphed = trainer.train_step.graph is not None
                if graphed:
                    mark_calls(trainer, task)
                steps = take(trainer)
                runtime.reset()
                for _ in range(WARM_UP):
                    next(steps)
                result = {"nodes": runtime.nodes(), "phases": nodes_by_phase(task)} if graphed else {"nodes": []}
                result["bare nodes"] = bare_nodes(config.train.global_batch_size, config.precision)
                with paused() if graphed else nullcontext():  # else the host decides by numbers
                    runtime.reset()
                    for _ in range(STEPS):
                        next(steps)
                    result["launches per step"] = runtime.counts().get("launch", 0) / STEPS
                    result["syncs per step"] = runtime.syncs() / STEPS
                    result["host us per step"] = host_us(steps) if graphed else None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
