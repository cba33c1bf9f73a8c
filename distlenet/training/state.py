"""The progress of a run: the plain values of every checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from distlenet.training.meter import Metrics
from distlenet.training.selection import Best
from distlenet.training.starts import RUN_ID
from distlenet.utils.structure import check_same_structure


@dataclass(frozen=True)
class TrainState:
    """Progress of a run; each change returns a new state."""

    step: int = 0  # optimizer steps done, over all epochs, skipped ones included
    epoch: int = 0  # epochs done
    batch: int = 0  # global batches done in the current epoch
    lr: float = 0.0  # of the last step
    evaluated: int = 0  # the step after which the last evaluation was made
    val: dict[str, float] = field(default_factory=dict)  # its metrics: val_loss and so on, if there is a validation set
    test: dict[str, float] = field(default_factory=dict)  # and test_loss and so on
    best: dict[str, Best] = field(default_factory=dict)  # the best values that select, by names such as val/loss
    skipped: int = 0  # steps that were not taken because of a non-finite loss or gradient
    restarts: int = 0  # starts of the run before this one
    micro_batch: int = 0  # samples of a rank's micro-batch when the run began
    started_from: str | None = None  # the checkpoint.resume=PATH that the run began with
    run_id: str = ""  # the run's id in W&B: 8 characters 0-9, a-z

    def advance(self, lr: float, skipped: bool) -> "TrainState":
        """Return the state after one more step."""
        state = object.__new__(TrainState)  # this runs in each step: dataclasses.replace takes five times as long
        changed = {"step": self.step + 1, "batch": self.batch + 1, "lr": lr, "skipped": self.skipped + skipped}
        vars(state).update(vars(self), **changed)
        return state

    def with_evaluation(self, metrics: Mapping[str, Metrics], best: dict[str, Best]) -> "TrainState":
        """Return the state after an evaluation, with its metrics by split and the best values so far."""
        values = {split: each.to_dict(f"{split}_") for split, each in metrics.items()}
        return replace(self, evaluated=self.step, val=values.get("val", {}), test=values.get("test", {}), best=best)

    def next_epoch(self) -> "TrainState":
        """Return the state at the start of the next epoch."""
        return replace(self, epoch=self.epoch + 1, batch=0)

    def state_dict(self) -> dict[str, Any]:
        """Return all values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "TrainState":
        """Read saved values. Raise KeyError if one is missing, ValueError if one is invalid."""
        if "best_accuracy" in state:  # saved by a version without validation sets
            state = {**state, "val": {}, "best": {}}
        expected = cls().state_dict()
        expected |= {split: dict.fromkeys(state[split], 0.0) for split in ("val", "test")}
        expected["best"] = dict.fromkeys(state["best"], asdict(Best(0.0)))
        check_same_structure({name: state[name] for name in expected}, expected, "state")
        if state["run_id"] and not RUN_ID.fullmatch(state["run_id"]):  # it names a directory
            raise ValueError(f"run_id {state['run_id']!r}: expected 8 characters 0-9, a-z")
        best = {name: Best(**values) for name, values in state["best"].items()}
        return cls(**{each.name: state[each.name] for each in fields(cls)} | {"best": best})
