"""Record what each rank of a run computes: digests per sample, and of gradients and weights, at each step."""

import json
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distlenet.data.batched_dataset import ResidentBatch
from distlenet.data.loader import EvaluationLoader
from distlenet.prove.comparison import GRADIENTS
from distlenet.prove.digests import digest, sample_digests
from distlenet.task import Batch, Data, Datasets, SampleKeys, Task
from distlenet.training.evaluator import Evaluator
from distlenet.training.meter import Metrics
from distlenet.training.step_result import StepResult
from distlenet.training.trainer import Trainer
from distlenet.utils.nested import count_samples


class Recorder:
    """Appends to a file, per stage and step, one line of {name: value}; names are sample indices or parameters."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = (directory / f"rank-{os.getpid()}.jsonl").open("a")
        self.place: str | None = None  # "step 3", "test after 6"; None: nothing is recorded
        self.indices: list[int] = []  # of the current batch
        # A micro-batch has no indices: they are found by the digests of its samples.
        self.index_of: dict[str, list[int]] = defaultdict(list)
        # Its ``indices`` are those of the current micro-batch. Of a thread: shards in lockstep are threads.
        self.current = threading.local()

    def add(self, stage: str, names: Iterable[Any], values: Iterable[Any]) -> None:
        """Add a line, complete on the file system: the rank may be killed at any time."""
        line = {"place": self.place, "stage": stage, "values": dict(zip(map(str, names), values, strict=True))}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def begin(self, place: str, indices: Tensor) -> None:
        """Record the samples of a batch from now on."""
        self.place, self.indices = place, indices.tolist()

    def add_inputs(self, raw: list[str], transformed: list[str]) -> None:
        """Record the samples of a batch, before and after the transform."""
        self.add("raw samples", self.indices, raw)
        self.add("transformed inputs", self.indices, transformed)
        self.index_of = defaultdict(list)
        for index, name in zip(self.indices, transformed, strict=True):
            self.index_of[name].append(index)

    def find_micro_batch(self, transformed: list[str]) -> None:
        """Find the indices of a micro-batch. Equal samples have equal digests, and equal losses."""
        self.current.indices = [self.index_of[name].pop(0) if self.index_of[name] else -1 for name in transformed]


class First:
    """The first samples of a dataset; it serves batches if the dataset does."""

    def __init__(self, dataset: Any, samples: int) -> None:
        self.dataset, self.samples = dataset, samples
        if hasattr(dataset, "get_batch"):
            self.get_batch = dataset.get_batch

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.dataset[index]


class RecordedTask(Task):
    """Precedes the user's class: its methods call the user's, and record what these receive and return."""

    recorder: Recorder
    most_test_samples: int

    def datasets(self) -> Datasets:
        """Return the user's datasets; those for evaluation are shortened."""
        data, most = super().datasets(), self.most_test_samples  # type: ignore[safe-super]
        if len(data.test) > most:
            data = replace(data, test=First(data.test, most))
        if data.validation is not None and len(data.validation) > most:
            data = replace(data, validation=First(data.validation, most))
        return data

    def transform(self, data: Data, keys: SampleKeys | None) -> Data:
        """Record samples before and after the transform."""
        recorder = self.recorder
        if recorder.place is None:
            return super().transform(data, keys)
        raw = sample_digests(data, len(recorder.indices))
        transformed = super().transform(data, keys)
        recorder.add_inputs(raw, sample_digests(transformed, len(raw)))
        return transformed

    def loss(self, model: nn.Module, data: Data) -> tuple[Any, Any]:
        """Record losses, and the weights of the losses if there are any."""
        recorder = self.recorder
        if recorder.place is None or not recorder.indices:  # a rank without samples may compute an example
            return super().loss(model, data)  # type: ignore[safe-super]
        recorder.find_micro_batch(sample_digests(data, count_samples(data)))
        result = super().loss(model, data)  # type: ignore[safe-super]
        columns = result[0] if isinstance(result[0], tuple) else (result[0],)
        values = torch.stack([column.detach().double() for column in columns], 1)
        recorder.add("losses", recorder.current.indices, values.tolist())  # host sync
        return result

    def metrics(self, outputs: Any, data: Data) -> dict[str, Tensor]:
        """Record metrics."""
        values = super().metrics(outputs, data)
        if self.recorder.place is not None:
            for name, value in values.items():
                names = [f"{name} of sample {index}" for index in self.recorder.current.indices]
                self.recorder.add("metrics", names, value.tolist())  # host sync
        return values


def recorded(task: Task, recorder: Recorder, most_test_samples: int) -> Task:
    """Make ``task`` record what its hooks do: its class becomes a subclass with the same name."""
    values = {"recorder": recorder, "most_test_samples": most_test_samples, "__module__": type(task).__module__}
    task.__class__ = type(type(task).__name__, (RecordedTask, type(task)), values)
    task.random_transform = True  # also on a GPU, the transform is called, and recorded, in each step
    return task


class RecordingEvaluator(Evaluator):
    """Records the samples of each batch."""

    def __init__(self, recorder: Recorder, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.recorder, self.place = recorder, ""

    def evaluate(self, split: str, model: nn.Module, step: int, analyse: bool = False) -> Metrics:
        """Record an evaluation."""
        self.place = f"{split} after {step}"
        metrics = super().evaluate(split, model, step, analyse)
        self.recorder.place = None
        return metrics

    def _interruptible(self, loader: EvaluationLoader, step: int) -> Iterator[Batch]:
        for batch in super()._interruptible(loader, step):
            self.recorder.begin(self.place, batch.indices)
            yield batch


class RecordingTrainer(Trainer):
    """Records gradients and weights, and the samples of each batch.

    Before step ``kill_before`` each rank kills itself, as the out-of-memory killer would: nothing is saved then.
    """

    def __init__(self, recorder: Recorder, kill_before: int | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.recorder, self.kill_before = recorder, kill_before
        outline, loaders = self.train_step.on_device.outline, self.evaluator.loaders
        parts = (outline, loaders, self.context, self.preemption, self.run_dir)
        self.evaluator = RecordingEvaluator(self.recorder, *parts)
        self.train_step.on_device.optimizer.register_step_pre_hook(self._record_gradients)

    def start(self) -> None:
        """Record the initial weights."""
        super().start()
        if self.resumed_from is None:
            self.recorder.place = "step 0"
            self._record_weights("initial weights")
            self.recorder.place = None

    def step(self, batch: Batch | ResidentBatch) -> StepResult:
        """Record a step."""
        self.checkpoints.store.wait()  # while it writes, the checkpoint after this step would be left out
        if self.state.step == self.kill_before:
            dist.barrier()  # collective: each rank has recorded all steps before this one
            os.kill(os.getpid(), signal.SIGKILL)
        self.recorder.begin(f"step {self.state.step}", batch.indices)
        result = super().step(batch)
        self._record_weights("weights")
        self.recorder.place = None
        return result

    def log(self, split: str, metrics: Metrics, **more: float) -> None:
        """Record the means that are logged."""
        if self.env.rank == 0:
            place, self.recorder.place = self.recorder.place, f"{split} after {self.state.step}"
            values = metrics.to_dict()
            self.recorder.add("totals", values, values.values())
            self.recorder.place = place
        super().log(split, metrics, **more)

    def _record_gradients(self, *_: Any) -> None:
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if self.env.rank == 0:  # all ranks have the same
            self.recorder.add("gradients", gradients, map(digest, gradients.values()))
            if self.state.step == 0:
                torch.save(
                    {name: value.cpu() for name, value in gradients.items()}, self.recorder.directory / GRADIENTS
                )

    def _record_weights(self, stage: str) -> None:
        if self.env.rank == 0:  # train.check_replicas_every compares those of the others
            state = self.model.state_dict()
            self.recorder.add(stage, state, map(digest, state.values()))
