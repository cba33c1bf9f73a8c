"""Compare what two runs recorded."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GRADIENTS = "gradients.pt"
"""The file with the gradients of the first step."""

STAGES = (
    "initial weights",
    "batches",
    "raw samples",
    "transformed inputs",
    "losses",
    "metrics",
    "gradients",
    "weights",
    "totals",
)
"""In the order in which a step computes them."""

DATA_STAGES = STAGES[:4]
"""The same bits on any number of ranks, in both reductions."""

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
"""Between numbers of ranks with ddp, for losses and for the gradient's norm in the first step.

A sum of float32 has relative errors of about 1e-7 per term, and gradients cancel: 1e-3 allows 10,000 times that.
"""

Records = dict[tuple[str, str], dict[str, list[Any]]]
"""{(place, stage): {name: values}}; one value per name, unless two ranks have computed the same sample."""


@dataclass(frozen=True)
class Difference:
    """The first difference between two runs."""

    place: str  # "step 3", "test after 6"
    stage: str
    detail: str

    def __str__(self) -> str:
        """Return the place, the stage and the values."""
        return f"the first difference is in {self.stage} of {self.place}: {self.detail}"


def read_records(directory: Path) -> Records:
    """Return what all ranks and starts of a run have recorded."""
    records: Records = defaultdict(lambda: defaultdict(list))
    for path in sorted(directory.glob("rank-*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            for name, value in line["values"].items():
                records[line["place"], line["stage"]][name].append(value)
                if line["stage"] == "raw samples":
                    records[line["place"], "batches"][name].append("")
    return records


@dataclass(frozen=True)
class Promise:
    """What must be equal between two runs."""

    same_bits: bool  # in all stages; otherwise only in DATA_STAGES
    close: bool = True  # the losses and the gradient of the first step
    tolerance: float = TOLERANCE["fp32"]


def compare(reference: Path, run: Path, promise: Promise) -> tuple[dict[str, str], Difference | None]:
    """Return the result per stage, and the first difference.

    A result is "same", "close", "differs", or "-" for what is not promised.
    """
    first, second = read_records(reference), read_records(run)
    results, differences = {}, []
    for stage in STAGES:
        if promise.same_bits or stage in DATA_STAGES:
            found, holds = _differences(first, second, stage), "same"
        elif promise.close and stage == "losses":
            found, holds = _far_losses(first, second, promise.tolerance), "close"
        elif promise.close and stage == "gradients":
            found, holds = _far_gradients(reference, run, promise.tolerance), "close"
        else:
            found, holds = [], "-"
        results[stage] = "differs" if found else holds
        differences += found
    return results, min(differences, key=_order, default=None)


def _order(difference: Difference) -> tuple[float, int]:
    """Sort in the order of time: the evaluation after 6 steps precedes step 6."""
    *words, number = difference.place.split()
    return int(number) - 0.5 * (len(words) > 1), STAGES.index(difference.stage)


def _differences(first: Records, second: Records, stage: str) -> list[Difference]:
    """Return the first difference at each place."""
    found = []
    for place in {place for place, recorded in [*first, *second] if recorded == stage}:
        one, other = first.get((place, stage), {}), second.get((place, stage), {})
        shared = one.keys() & other.keys() if stage not in ("batches", "initial weights") else one.keys() | other.keys()
        names = [name for name in shared if sorted(one.get(name, [])) != sorted(other.get(name, []))]
        if names:
            name = min(names, key=lambda name: (len(name), name))
            detail = f"{len(names)} of {len(shared)} differ, first {f'sample {name}' if name.isdigit() else name}"
            found.append(Difference(place, stage, detail + _values(one.get(name, []), other.get(name, []))))
    return found


def _values(one: list[Any], other: list[Any]) -> str:
    """Return the two values, unless they are digests."""
    digests = [value for value in (*one, *other) if isinstance(value, str)]
    return "" if digests else f": {one}, {other}"


def _far_losses(first: Records, second: Records, tolerance: float) -> list[Difference]:
    """Compare the losses of the first step, relative to the loss, or absolute below 1."""
    one, other = first["step 0", "losses"], second["step 0", "losses"]
    for name in sorted(one.keys() & other.keys(), key=int):
        pairs = zip(one[name][0], other[name][0], strict=True)
        if any(abs(a - b) > tolerance * max(1.0, abs(a)) or math.isnan(a) != math.isnan(b) for a, b in pairs):
            return [Difference("step 0", "losses", f"first sample {name}{_values(one[name], other[name])}")]
    return []


def _far_gradients(reference: Path, run: Path, tolerance: float) -> list[Difference]:
    """Compare the norm of the difference of the first step's gradients with the norm of the gradient."""
    one, other = (torch.load(path / GRADIENTS, weights_only=True) for path in (reference, run))
    names = [name for name in one if name in other]
    norm = math.hypot(*(float(one[name].double().norm()) for name in names))
    distance = math.hypot(*(float((one[name].double() - other[name].double()).norm()) for name in names))
    if distance <= tolerance * norm:
        return []
    return [Difference("step 0", "gradients", f"relative distance {distance / max(norm, 1e-300):.2g}")]
