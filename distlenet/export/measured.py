"""The results of the comparison: parity, metrics, and what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distlenet.export.parity import read_part
from distlenet.export.reference import Reference
from distlenet.export.trained_source import RunData
from distlenet.utils.errors import UserError

ACCURACY = "accuracy"


@dataclass
class FileResult:
    """The fields of ``parity.Parity``, and the metrics over the test set."""

    samples: int
    largest_difference: float
    largest_difference_of_predictions: float
    same_classes: int | None
    within_rounding: int
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self, tolerance: float | None) -> dict[str, Any]:
        """Return the values of model.json."""
        return {
            "samples": self.samples,
            "largest_difference": self.largest_difference,
            "tolerance": tolerance,
            "same_classes": self.same_classes,
            "within_rounding": self.within_rounding,
            "metrics": self.metrics,
        }

    @property
    def agreement(self) -> float | None:
        """The share of samples with the class of the network."""
        return None if self.same_classes is None else self.same_classes / self.samples


@torch.no_grad()
def measure_metrics(data: RunData, reference: Reference, results: Mapping[str, FileResult]) -> None:
    """Add the metrics of the outputs of each file: means over the test set."""
    sums: dict[str, dict[str, float]] = {name: {} for name in results}
    for label, batch in zip(reference.parts, data.test_batches(), strict=True):
        targets = data.task.transform(batch, None)
        for name in results:
            (outputs,) = read_part(reference.directory, label, ["outputs"], f"{name}.").values()
            for metric, values in data.task.metrics(torch.from_numpy(outputs), targets).items():
                sums[name][metric] = sums[name].get(metric, 0.0) + float(values.double().sum())
    for name, result in results.items():
        result.metrics = {metric: total / reference.samples for metric, total in sums[name].items()}


def check_parity(results: Mapping[str, FileResult], reference: Reference) -> None:
    """Raise UserError if a file computes something else than the network."""
    for name, result in results.items():
        problems = []
        for output, difference in (
            ("outputs", result.largest_difference),
            ("predictions", result.largest_difference_of_predictions),
        ):
            if not difference <= reference.tolerances[output]:  # also NaN
                problems.append(
                    f"{output} differ by up to {difference:.3g}, rounding by {reference.tolerances[output]:.3g}"
                )
        if result.same_classes is not None and (wrong := result.samples - result.same_classes - result.within_rounding):
            problems.append(f"{wrong} of {result.samples} samples have another class")
        if problems:
            raise UserError(
                f"export: {name}: does not compute what the network computes: {'; '.join(problems)}; nothing is written"
            )


def check_int8(exact: FileResult, quantized: FileResult, max_drop: float) -> None:
    """Raise UserError if quantization loses more than ``max_drop`` percentage points.

    Of the accuracy, or, if the task has none, of the share of samples with the class of the network.
    """
    if ACCURACY in exact.metrics:
        name, before, after = ACCURACY, exact.metrics[ACCURACY], quantized.metrics[ACCURACY]
    elif quantized.agreement is not None:
        name, before, after = "agreement with the network", 1.0, quantized.agreement
    else:
        raise UserError("--quantize int8: the task has no metric accuracy and no classes; remove --quantize")
    drop = 100 * (before - after)
    if not drop <= max_drop:
        raise UserError(
            f"--quantize int8: the {name} falls from {before:.2%} to {after:.2%}, by more than --max-drop {max_drop:g} "
            "points; give a larger value, or remove --quantize; nothing is written"
        )
