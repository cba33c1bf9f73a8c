"""``python -m distlenet.export.parity DIRECTORY``: run exported files in a fresh process and compare their outputs.

``export`` writes the inputs and the outputs of the network over the whole test set to ``DIRECTORY``: for each batch
``00000.NAME.npy`` for each input and output, and ``job.json``. This program adds ``00000.FILE.NAME.npy`` for each
output, and ``results.json``. It imports PyTorch only for files that need it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distlenet.export.runners import Arrays, Runner, load_runner


@dataclass
class Parity:
    """How the outputs of a file differ from those of the network, over all samples."""

    samples: int = 0
    largest_difference: float = 0.0  # of ``outputs``
    largest_difference_of_predictions: float = 0.0
    same_classes: int | None = None  # samples; None if the outputs are not classes
    within_rounding: int = (
        0  # samples with another class whose two best classes differ by less than rounding can explain
    )

    def add(self, found: Arrays, expected: Arrays, tolerances: Mapping[str, float]) -> None:
        """Add a batch."""
        for name in ("outputs", "predictions"):
            if found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype:
                shapes = (
                    f"{found[name].dtype} {list(found[name].shape)}",
                    f"{expected[name].dtype} {list(expected[name].shape)}",
                )
                raise ValueError(f"{name}: {shapes[0]} in place of {shapes[1]}")
        self.samples += len(expected["outputs"])
        difference = {name: largest_difference(found[name], expected[name]) for name in ("outputs", "predictions")}
        self.largest_difference = worse(self.largest_difference, difference["outputs"])
        self.largest_difference_of_predictions = worse(
            self.largest_difference_of_predictions, difference["predictions"]
        )
        classes = classes_of(expected)
        if classes is not None:
            same = classes == classes_of(found)
            self.same_classes = (self.same_classes or 0) + int(same.sum())
            self.within_rounding += int((~same & (margins_of(expected, tolerances) < 2.0)).sum())


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; NaN if a value is NaN."""
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))


def worse(a: float, b: float) -> float:
    """Return the larger value, or NaN."""
    return float(np.maximum(a, b))


def classes_of(outputs: Arrays) -> np.ndarray | None:
    """Return the class of each sample, (n,): the largest prediction, or the sign of a single output, or None."""
    logits, predictions = outputs["outputs"], outputs["predictions"]
    if predictions.ndim == 2 and predictions.shape[1] > 1:
        classes: np.ndarray = predictions.argmax(1)
        return classes
    return logits.reshape(len(logits)) > 0 if logits.size == len(logits) else None


def margins_of(outputs: Arrays, tolerances: Mapping[str, float]) -> np.ndarray:
    """Return, in units of the tolerance, how far the value of another class is, (n,).

    Two values may each differ by the tolerance: the class can be another one if the margin is below 2.
    """
    logits, predictions = outputs["outputs"], outputs["predictions"]
    if predictions.ndim == 2 and predictions.shape[1] > 1:
        best = np.sort(predictions, axis=1)[:, -2:]
        margins: np.ndarray = (best[:, 1] - best[:, 0]) / tolerances["predictions"]
        return margins
    return 2 * np.abs(logits.reshape(len(logits))) / tolerances["outputs"]


def compare(directory: Path, job: Mapping[str, Any], name: str, run: Runner) -> Parity:
    """Run a network over all batches, keep its outputs, and compare them. Then on single samples."""
    parity, singles = Parity(), Parity()
    for label in job["parts"]:
        inputs, expected = (read_part(directory, label, job[kind]) for kind in ("inputs", "outputs"))
        found = run(inputs)
        parity.add(found, expected, job["tolerances"])
        for key in job["outputs"]:
            np.save(directory / f"{label}.{name}.{key}.npy", found[key])
    for label in job["singles"]:
        inputs, expected = (read_part(directory, label, job[kind]) for kind in ("inputs", "outputs"))
        singles.add(run(inputs), expected, job["tolerances"])
    for field in ("largest_difference", "largest_difference_of_predictions"):
        setattr(parity, field, worse(getattr(parity, field), getattr(singles, field)))
    return parity


def read_part(directory: Path, label: str, names: Sequence[str], prefix: str = "") -> Arrays:
    """Return the arrays of a batch by name; those of a file with ``prefix`` ``FILE.``."""
    return {name: np.load(directory / f"{label}.{prefix}{name}.npy") for name in names}


def main() -> None:
    """Compare all networks of the job."""
    directory = Path(sys.argv[1])
    job = json.loads((directory / "job.json").read_text())
    results = {}
    for name, files in job["networks"].items():
        run = load_runner([Path(file) for file in files], job["network"])
        results[name] = asdict(compare(directory, job, name, run))
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
