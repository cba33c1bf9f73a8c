"""Which values of the validation set select ``best.pt`` and end a run early. The test set selects nothing."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from distlenet.config.schema import Config
from distlenet.training.meter import Metrics
from distlenet.utils.errors import UserError

LOWER_IS_BETTER = ("loss", "error")
"""The ends of the names of metrics that are minimised; all others are maximised."""


@dataclass(frozen=True)
class Best:
    """The best value of a metric so far."""

    value: float
    step: int = 0  # after which it was measured; 0: never
    stale: int = 0  # evaluations since


class Selection:
    """Follow ``checkpoint.best_by`` and ``train.stop_when``, by the metrics of the validation set."""

    def __init__(self, config: Config, has_validation: bool) -> None:
        """Raise UserError if a setting needs a validation set, and there is none."""
        given = {"checkpoint.best_by": config.checkpoint.best_by, "train.stop_when": config.train.stop_when}
        for key, name in given.items():
            if name is not None and not has_validation:
                raise UserError(
                    f"{key}={name}: the data has no validation set; give data.validation=0.1, or data with one"
                )
        self.given = {key: name for key, name in given.items() if name is not None}
        self.best_by = (config.checkpoint.best_by or "val/loss") if has_validation else None
        self.stop_when, self.patience = config.train.stop_when, config.train.stop_patience
        self.names = dict.fromkeys(name for name in (self.best_by, self.stop_when) if name is not None)

    def check_names(self, metrics: Collection[str]) -> None:
        """Raise UserError if a setting names a metric that the task does not have. ``metrics`` are all but ``loss``."""
        for key, name in self.given.items():
            if name.removeprefix("val/") not in ("loss", *metrics):
                known = ", ".join(f"val/{metric}" for metric in ("loss", *metrics))
                raise UserError(f"{key}={name}: the task has no such metric; give one of {known}")

    def update(self, best: Mapping[str, Best], metrics: Metrics, step: int) -> dict[str, Best]:
        """Return the best values after an evaluation of the validation set after ``step`` steps."""
        self.check_names([name for name in metrics.means if name != "loss"])
        updated = {}
        for name in self.names:
            value = metrics.means[name.removeprefix("val/")]
            sign = 1 if name.endswith(LOWER_IS_BETTER) else -1
            known = best.get(name, Best(sign * math.inf))
            improved = sign * value < sign * known.value  # not if the value is NaN
            updated[name] = Best(value, step) if improved else replace(known, stale=known.stale + 1)
        return updated

    def is_best(self, best: Mapping[str, Best]) -> bool:
        """Return whether the last evaluation was the best by ``checkpoint.best_by``."""
        return self.best_by is not None and self.best_by in best and best[self.best_by].stale == 0

    def stops(self, best: Mapping[str, Best]) -> bool:
        """Return whether the run ends early: too many evaluations did not improve ``train.stop_when``."""
        name = self.stop_when
        return name is not None and name in best and best[name].stale >= self.patience
