"""How far a run has come, and how often it was started."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from distlenet.tracking.base import Record
from distlenet.training.meter import Metrics
from distlenet.training.starts import RUN_ID
from distlenet.utils.structure import check_same_structure


@dataclass
class TrainState:
    """Where a run stands; part of every checkpoint, as plain values."""

    step: int = 0  # optimizer steps done, over all epochs
    epoch: int = 0  # epochs done
    batch: int = 0  # global batches done in the epoch under way
    lr: float = 0.0  # of the last step
    evaluated: int = 0  # the step after which the last evaluation was made
    test: Record = field(default_factory=dict)  # its metrics
    best_accuracy: float = -1.0
    skipped: int = 0  # steps that were not taken, since not finite
    restarts: int = 0  # how often the run went on from a checkpoint
    micro_batch: int = 0  # images of a rank's micro-batch when the run began
    started_from: str | None = None  # the checkpoint.resume=PATH it began with
    run_id: str = ""  # the run's name among trackers, of 8 letters and digits

    def take_test(self, metrics: Metrics) -> bool:
        """Note an evaluation after the present step; return whether it is the best yet."""
        self.evaluated = self.step
        self.test = metrics.named("test")
        best = metrics.accuracy > self.best_accuracy
        self.best_accuracy = max(metrics.accuracy, self.best_accuracy)
        return best

    def state_dict(self) -> dict[str, Any]:
        """Return all values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up saved values. Raises KeyError where one is missing, ValueError where one cannot be."""
        like = asdict(TrainState()) | {"test": Metrics(0.0, 0.0, 0).named("test") if state["test"] else {}}
        check_same_structure({name: state[name] for name in like}, like, "progress")
        if state["run_id"] and not RUN_ID.fullmatch(state["run_id"]):  # it names a folder
            raise ValueError(f"run_id {state['run_id']!r}: expected 8 letters and digits")
        for each in fields(self):
            setattr(self, each.name, state[each.name])
