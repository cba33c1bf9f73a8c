"""Check each hook of a task by direct calls, in one process: this takes seconds and finds most mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distlenet.config.schema import Config
from distlenet.data.batched_dataset import AnyDataset, BatchedDataset, Request
from distlenet.data.seeding import EVALUATION_EPOCH, load_samples
from distlenet.distributed.context import DistributedContext
from distlenet.prove.checks import Finding, HookError, compare_digests, hook, spoil_generators
from distlenet.prove.digests import digest, is_per_sample, sample_digests, take
from distlenet.prove.model_contract import ModelContract
from distlenet.task import Data, SampleKeys, Task, datasets_of
from distlenet.utils.nested import map_tensors

SAMPLES, ALONE = 64, 8  # samples of each set that are loaded; those of them that are also transformed alone


@dataclass
class Contract:
    """The checks of one task, and their result."""

    config: Config
    task: Task
    context: DistributedContext
    findings: list[Finding] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)  # must be the same in another process
    mixes_in_training: bool = False  # a loss depends on its micro-batch, as with BatchNorm or dropout

    def run(self) -> None:
        """Run all checks, until a hook raises an exception."""
        try:
            with hook("dataset"):
                datasets = datasets_of(self.task)
            for split in ("validation", "test"):
                if getattr(datasets, split) is not None:
                    self.check_data(split, getattr(datasets, split), EVALUATION_EPOCH)
            keys = self.check_data("train", datasets.train, epoch=0)
            self.check_transform(datasets.train, keys, training=False)
            inputs = self.check_transform(datasets.train, keys, training=True)
            few = take(inputs, range(min(len(keys.indices), self.task.eval_batch_size)))
            model = ModelContract(self.config, self.task, self.context, few)
            self.fingerprint |= model.weights()
            self.findings += model.run()
            self.mixes_in_training = model.mixes_in_training()
        except HookError as error:
            self.findings.append(Finding(f"{error.hook}: runs", "raised", str(error), error.hook))

    def report(self, check: str, cause: str, problem: str | None) -> None:
        """Add a finding."""
        self.findings.append(Finding(check, cause if problem else None, problem or ""))

    def check_data(self, split: str, dataset: AnyDataset, epoch: int) -> SampleKeys:
        """Load samples twice, and combine them. Return their keys."""
        with hook("dataset"):
            length = len(dataset)
            indices = torch.linspace(0, length - 1, min(SAMPLES, length)).long()
            first, digests = self.load(dataset, indices, epoch, 1)
            _, again = self.load(dataset, indices.flip(0), epoch, 2)
        names = [f"{split} sample {index}" for index in indices.tolist()]
        self.fingerprint[f"number of {split} samples"] = str(length)
        self.fingerprint |= zip(names, digests, strict=True)
        differ = compare_digests(names, digests, again[::-1])
        self.report(f"dataset: {split} samples again, in reverse order", "dataset again", differ)
        if not hasattr(dataset, "get_batch"):
            self.check_collate(split, names, first)
        return SampleKeys(self.config.seed, epoch, indices)

    def load(self, dataset: AnyDataset, indices: torch.Tensor, epoch: int, seed: int) -> tuple[Any, list[str]]:
        """Return samples, as a list or a batch, and their digests."""
        spoil_generators(seed)
        if hasattr(dataset, "get_batch"):
            batch = dataset.get_batch(indices)
            return batch, sample_digests(batch, len(indices))
        samples = load_samples(dataset, SampleKeys(self.config.seed, epoch, indices))
        return samples, list(map(digest, samples))

    def check_collate(self, split: str, names: list[str], samples: list[Any]) -> None:
        """Combine samples, together and alone."""
        with hook("collate"):
            data = self.task.collate(samples)
            if not is_per_sample(data, len(samples)):
                raise ValueError("expected tensors with the samples in the first dimension, or lists of one per sample")
            alone = [sample_digests(self.task.collate([sample]), 1)[0] for sample in samples]
            differ = compare_digests(names, sample_digests(data, len(samples)), alone)
        self.report(f"collate: {split} samples alone", "collate", differ)

    def check_transform(self, dataset: AnyDataset, keys: SampleKeys, training: bool) -> Data:
        """Transform a batch again, in reverse order, and sample by sample; return the transformed batch."""
        n, device = len(keys.indices), self.context.device
        partners = self.task.partners and training
        with hook("dataset"):
            batches = BatchedDataset(dataset, self.task.collate, self.config.seed, partners)
            batch = batches[Request(0, keys.indices)].data
        data, indices = map_tensors(lambda tensor: tensor.to(device), (batch, keys.indices))
        names = [f"sample {index}" for index in indices.tolist()]

        def transform(positions: Sequence[int], seed: int) -> Data:
            spoil_generators(seed)
            some = replace(keys, indices=indices[list(positions)]) if training else None
            return self.task.transform(take(data, positions), some)

        with hook("transform"):
            inputs = transform(range(n), 1)
            digests = sample_digests(inputs, n)
            again = compare_digests(names, digests, sample_digests(transform(range(n), 2), n))
            others = sample_digests(transform(range(n)[::-1], 3), n)[::-1]
            others[:ALONE] = [sample_digests(transform([k], 4), 1)[0] for k in range(min(n, ALONE))]
        mode = "training" if training else "evaluation"
        self.report(f"transform: again, in {mode}", "transform again", again)
        if not again:
            alone = compare_digests(names, digests, others)
            self.report(f"transform: samples alone, in {mode}", "transform alone", alone)
        return inputs
