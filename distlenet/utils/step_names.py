"""The names of checkpoints, as files and as objects of an object store."""

import re
from collections.abc import Iterable

STEP_NAME = re.compile(r"(?:checkpoints/)?step-(\d+)\.pt")


def step_name(step: int) -> str:
    """Return the name of the file after ``step`` steps, such as ``step-00001234.pt``."""
    return f"step-{step:08d}.pt"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint, of its file or object; None for other names."""
    matched = STEP_NAME.fullmatch(name)
    return int(matched[1]) if matched else None


def in_order(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are of checkpoints after a step, in the order of their steps."""
    steps = {name: step for name in names if (step := step_of(name)) is not None}
    return sorted(steps, key=lambda name: steps[name])
