"""When a trainer's state is saved and taken up again: rank 0 reads and writes, all ranks decide together."""

from pathlib import Path
from typing import NoReturn, Protocol

import torch

from distlenet.checkpoint.file import State, load_model
from distlenet.checkpoint.folder import CheckpointFolder
from distlenet.checkpoint.resume import choose_resumable
from distlenet.distributed import all_or_none, any_rank, from_rank_0
from distlenet.errors import Preempted, UserError
from distlenet.preemption import Preemption
from distlenet.progress import Progress
from distlenet.schema import Config
from distlenet.session import Session
from distlenet.tracking import Tracker
from distlenet.tracking.ledger import NoLedger


class Trainable(Protocol):
    """What is saved: a trainer."""

    at: Progress
    ledger: NoLedger

    @property
    def net(self) -> torch.nn.Module:
        """The bare network."""

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on. A collective."""

    def load_state_dict(self, state: State) -> None:
        """Take it up."""


class Checkpointer:
    """Saves and restores one trainer; every method is a collective."""

    def __init__(self, config: Config, session: Session, folder: Path, tracker: Tracker) -> None:
        """Keep checkpoints in the run folder ``folder``."""
        self.config, self.session, self.tracker = config, session, tracker
        self.rank = session.world.rank
        self.files = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
        self.skipped: str | None = None  # why the last one was not even tried

    def restore(self, trainer: Trainable) -> Path | None:
        """Go on from where ``checkpoint.resume`` says: rank 0 reads, all take it. None says: from scratch.

        Raises UserError, on every rank, where the checkpoint is not one to go on from.
        """
        found: tuple[Path, State] | None = None
        with all_or_none():
            if self.rank == 0:
                self.files.remove_torn()
                found = choose_resumable(self.config, self.files, trainer.net)
        found = from_rank_0(found)
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
        if self.config.data.ledger and any_rank(trainer.ledger.behind, self.session.device):
            self.skipped = "lines of a rank's ledger could not be written"
            return False
        self.skipped = None
        if self.rank == 0 and (must or not self.files.busy):
            self.files.save(state, best, before=self.tracker.sync)
        return True

    def stop(self, trainer: Trainable, preemption: Preemption) -> NoReturn:
        """Save, and end the run as a signal asked. Raises Preempted on every rank."""
        self.session.watchdog.expect(self.config.distributed.start_timeout_s, "distributed.start_timeout_s")
        self.save(trainer)
        failure = self.skipped
        if self.rank == 0:
            failure = failure or self.files.wait(preemption.seconds_left())
        failure, by = from_rank_0((failure, preemption.asked_by or "a signal to another rank"))
        outcome = f"NOT saved ({failure})" if failure else "saved"
        raise Preempted(f"stopped by {by} after step {trainer.at.step}, {outcome}; run the same command again to go on")

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises UserError, on every rank, where it is not."""
        self.session.watchdog.expect(self.config.distributed.start_timeout_s, "distributed.start_timeout_s")
        failure = from_rank_0(self.skipped or (self.files.wait() if self.rank == 0 else None))
        if failure:
            raise UserError(f"the trained network is not saved: {failure}; mend that and run the same command again")

    def close(self) -> None:
        """Let a write under way end, also after an error. The one method that is no collective."""
        self.files.wait(self.config.checkpoint.grace_s)
