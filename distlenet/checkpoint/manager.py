"""When a trainer's state is saved and taken up again: rank 0 reads and writes, all ranks decide together."""

from pathlib import Path
from typing import NoReturn, Protocol

import torch

from distlenet.checkpoint.compatibility import choose_resumable
from distlenet.checkpoint.format import State, load_model
from distlenet.checkpoint.store import CheckpointStore
from distlenet.config.schema import Config
from distlenet.data.sample_log import NoSampleLog
from distlenet.distributed.collectives import any_rank, broadcast_object, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import Preemption
from distlenet.tracking.base import Tracker
from distlenet.training.state import TrainState
from distlenet.utils.errors import Preempted, UserError


class Trainable(Protocol):
    """What is saved: a trainer."""

    at: TrainState
    ledger: NoSampleLog

    @property
    def net(self) -> torch.nn.Module:
        """The bare network."""

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on. A collective."""

    def load_state_dict(self, state: State) -> None:
        """Take it up."""


class CheckpointManager:
    """Saves and restores one trainer; every method is a collective."""

    def __init__(self, config: Config, context: DistributedContext, folder: Path, tracker: Tracker) -> None:
        """Keep checkpoints in the run folder ``folder``."""
        self.config, self.context, self.tracker = config, context, tracker
        self.rank = context.env.rank
        self.files = CheckpointStore(folder / "checkpoints", config.checkpoint.keep_last)
        self.skipped: str | None = None  # why the last one was not even tried

    def restore(self, trainer: Trainable) -> Path | None:
        """Go on from where ``checkpoint.resume`` says: rank 0 reads, all take it. None says: from scratch.

        Raises UserError, on every rank, where the checkpoint is not one to go on from.
        """
        found: tuple[Path, State] | None = None
        with raise_on_all_ranks():
            if self.rank == 0:
                self.files.remove_temporary_files()
                found = choose_resumable(self.config, self.files, trainer.net)
        found = broadcast_object(found)
        if found is None:
            return None
        path, state = found
        load_model(trainer.net, state, path)
        try:
            trainer.load_state_dict(state)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"checkpoint {path}: holds a network, but no state that training can go on from "
                f"({type(error).__name__}: {error}); give another, or only evaluate it"
            ) from error
        trainer.at.restarts += 1
        return path

    def save(self, trainer: Trainable, best: bool = False, must: bool = True) -> bool:
        """Have rank 0 write a checkpoint in the background; say whether it will.

        One that need not be (``must=False``) is left out where the one before is still being written. None is
        written where lines of a ledger wait for a disk: a run that went on from it would miss them for ever.
        """
        state = trainer.state_dict()
        if self.config.data.ledger and any_rank(trainer.ledger.has_unwritten_lines, self.context.device):
            self.skipped = "lines of a rank's ledger could not be written"
            return False
        self.skipped = None
        if self.rank == 0 and (must or not self.files.busy):
            self.files.save(state, best, before=self.tracker.sync)
        return True

    def stop(self, trainer: Trainable, preemption: Preemption) -> NoReturn:
        """Save, and end the run as a signal asked. Raises Preempted on every rank."""
        self.context.watchdog.set_timeout(self.config.distributed.init_timeout_s, "distributed.init_timeout_s")
        self.save(trainer)
        failure = self.skipped
        if self.rank == 0:
            failure = failure or self.files.wait(preemption.seconds_left())
        failure, by = broadcast_object((failure, preemption.requested_by or "a signal to another rank"))
        outcome = f"NOT saved ({failure})" if failure else "saved"
        raise Preempted(f"stopped by {by} after step {trainer.at.step}, {outcome}; run the same command again to go on")

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises UserError, on every rank, where it is not."""
        self.context.watchdog.set_timeout(self.config.distributed.init_timeout_s, "distributed.init_timeout_s")
        failure = broadcast_object(self.skipped or (self.files.wait() if self.rank == 0 else None))
        if failure:
            raise UserError(f"the trained network is not saved: {failure}; mend that and run the same command again")

    def close(self) -> None:
        """Let a write under way end, also after an error. The one method that is no collective."""
        self.files.wait(self.config.checkpoint.preemption_grace_s)
