"""What an exported file is compared with: inputs, and the outputs of the network, over the whole test set."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distlenet.export.exported_network import ExportedNetwork, Inputs
from distlenet.export.tolerances import RoundingError
from distlenet.utils.errors import UserError

Single = tuple[int, Inputs]
"""The index of a sample among all, and the sample as a batch of one."""

MEASURED_PARTS, MEASURED_SAMPLES = 32, 8  # batches whose rounding error is measured, and samples of each


@dataclass
class Reference:
    """The batches in ``directory``, and what they have in common."""

    directory: Path
    parts: list[str] = field(default_factory=list)  # the labels of the batches, with which their files' names begin
    singles: list[str] = field(default_factory=list)  # those of batches of one sample, which the parts contain, too
    samples: int = 0
    example: Inputs = field(default_factory=dict)  # two samples, of the largest shape
    shapes: dict[str, list[int | None]] = field(default_factory=dict)  # of inputs and outputs; None: dynamic
    dtypes: dict[str, str] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)

    def dynamic(self) -> dict[str, set[int]]:
        """Return the dimensions of each input that are dynamic."""
        return {name: {i for i, size in enumerate(self.shapes[name]) if size is None} for name in self.example}

    def row(self, name: str, index: int) -> Tensor:
        """Return an input or output of one sample, without the batch dimension."""
        batch_size = len(np.load(self.directory / f"{self.parts[0]}.{name}.npy", mmap_mode="r"))  # the last has fewer
        part = np.load(self.directory / f"{self.parts[index // batch_size]}.{name}.npy", mmap_mode="r")
        return torch.from_numpy(np.array(part[index % batch_size]))

    def add(self, label: str, inputs: Inputs, outputs: Inputs) -> None:
        """Write a batch, and note its shapes."""
        for name, tensor in {**inputs, **outputs}.items():
            np.save(self.directory / f"{label}.{name}.npy", tensor.numpy())
            shape = [None, *tensor.shape[1:]]
            known = self.shapes.setdefault(name, shape)
            if len(known) != len(shape):
                raise UserError(f"export: {name} has {len(known)} dimensions in one batch and {len(shape)} in another")
            self.shapes[name] = [a if a == b else None for a, b in zip(known, shape, strict=True)]
            self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if not self.example or _sample_size(inputs) > _sample_size(self.example):
            self.example = {name: torch.cat([tensor, tensor])[:2].clone() for name, tensor in inputs.items()}


@torch.no_grad()
def write_reference(
    network: ExportedNetwork,
    batches: Iterable[Inputs],
    expected: int,
    singles: Iterable[Single],
    directory: Path,
) -> Reference:
    """Compute the outputs for all batches, and write inputs and outputs to ``directory``, one file for each tensor.

    ``expected`` is the number of batches; ``singles`` are some of the samples, each alone, whose shapes may
    differ. Raise UserError if outputs are not finite or of a wrong shape, or if a sample alone has other outputs.
    """
    reference, error = Reference(directory), RoundingError(network)
    every = max(1, expected // MEASURED_PARTS)
    for part, inputs in enumerate(batches):
        outputs = network(**inputs)
        reference.samples += _check(network, inputs, outputs)
        if part % every == 0:
            error.measure({name: tensor[:MEASURED_SAMPLES] for name, tensor in inputs.items()})
        error.observe(outputs)
        reference.parts.append(f"{part:05}")
        reference.add(reference.parts[-1], inputs, outputs)
    if not reference.samples:
        raise UserError("export: the test set has no samples; give --check random")
    reference.tolerances = error.tolerances()
    for row, inputs in singles:
        outputs = network(**inputs)
        _check(network, inputs, outputs)
        _check_alone(network, reference, row, outputs)
        reference.singles.append(f"single{row}")
        reference.add(reference.singles[-1], inputs, outputs)
    return reference


def _check_alone(network: ExportedNetwork, reference: Reference, row: int, outputs: Inputs) -> None:
    """Raise UserError if a sample has other outputs than in its batch. Those of another shape are not compared."""
    for key, tensor in outputs.items():
        in_batch = reference.row(key, row)
        if in_batch.shape != tensor[0].shape:
            continue
        difference = float((tensor[0].double() - in_batch.double()).abs().max())
        if difference > reference.tolerances[key]:
            raise UserError(
                f"{type(network.task).__name__}: {key} of a sample alone and in a batch differ by {difference:.3g}, "
                f"rounding by {reference.tolerances[key]:.3g}: an answer would depend on the requests of other users; "
                "in predict and forward, compute each sample from its own values"
            )


def _sample_size(inputs: Inputs) -> int:
    return sum(tensor[0].numel() for tensor in inputs.values())


def _check(network: ExportedNetwork, inputs: Inputs, outputs: dict[str, Tensor]) -> int:
    """Return the number of samples. Raise UserError for outputs that cannot be compared."""
    name, count = type(network.task).__name__, len(next(iter(inputs.values())))
    for key, tensor in {**inputs, **outputs}.items():
        if tensor.dim() == 0 or len(tensor) != count:
            raise UserError(
                f"{name}: {key} has the shape {list(tensor.shape)} for {count} samples; the first dimension must be "
                "the sample"
            )
    if not all(bool(tensor.isfinite().all()) for tensor in outputs.values()):
        raise UserError(f"{name}: the network's outputs are not finite; give another checkpoint")
    return count


def random_batches(like: Inputs, low: float, high: float, sizes: Sequence[int]) -> Iterator[Inputs]:
    """Yield batches of random samples with the dtypes and shapes of ``like``, with values from low to high."""
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield {
            name: _random((size, *tensor.shape[1:]), tensor.dtype, low, high, generator)
            for name, tensor in like.items()
        }


def _random(shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator, dtype=dtype) * (high - low) + low
    return torch.randint(int(low), int(high) + 1, shape, generator=generator, dtype=dtype)
