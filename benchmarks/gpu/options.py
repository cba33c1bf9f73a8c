"""The options that all questions receive."""

import json
from dataclasses import asdict, dataclass, field

REQUIRED = {
    "accuracy": 0.90,  # of the default recipe, after all its epochs
    "plain": 20.0,  # times the speed of the plain recipe, at batch 1024
    "replay": 0.85,  # of the speed of the bare graph replay, at batch 1024
    "exit_s": 15.0,  # seconds from an exception, or from a signal, to the end of the process
}
"""The limits of promises, by the names of ``--require``."""

PROMISED = ("fp32", "bf16")
"""Precisions with promises about speed and CUDA graphs; fp16 is only measured: its loss scale may need the host."""


@dataclass(frozen=True)
class Options:
    """Limits and sizes."""

    required: dict[str, float] = field(default_factory=REQUIRED.copy)
    scale: float = 1.0  # of steps, rounds and sizes

    def size(self, full: int, least: int = 1) -> int:
        """Return a number of steps or samples, scaled."""
        return max(least, round(full * self.scale))

    def to_json(self) -> str:
        """Return the options as text, for a command line."""
        return json.dumps(asdict(self))


def from_json(text: str) -> Options:
    """Return the options that ``to_json`` wrote."""
    return Options(**json.loads(text))


def parse_requirement(text: str) -> tuple[str, float]:
    """Return name and limit of ``NAME=VALUE``. Raise ValueError unless the name is known and the value a number."""
    name, _, value = text.partition("=")
    if name not in REQUIRED:
        raise ValueError(f"--require {text}: expected NAME=NUMBER with one of {', '.join(REQUIRED)}")
    return name, float(value)
