"""Saving and restoring the training state: rank 0 reads and writes, all ranks decide together."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

from torch import nn

from distlenet.checkpoint.compatibility import choose_resumable
from distlenet.checkpoint.format import State, load_model
from distlenet.checkpoint.store import CheckpointStore
from distlenet.config.schema import Config
from distlenet.distributed.collectives import broadcast_object, broadcast_state, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import Preemption
from distlenet.utils.errors import Preempted, UserError


class Stateful(Protocol):
    """An object whose state is saved."""

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on. A collective."""

    def load_state_dict(self, state: State) -> None:
        """Load a saved state, except the weights of the model, which are loaded before. A collective."""


class CheckpointManager:
    """Saves and restores one training state. All methods but ``close`` are collectives."""

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        run_dir: Path,
        model: nn.Module,
        blocker: Callable[[], str | None],
        before_write: Callable[[], None],
    ) -> None:
        """Keep checkpoints in the run directory ``run_dir``; ``model`` is the bare module.

        ``blocker``, a collective, returns the reason not to write a checkpoint now, or None. ``before_write`` is called
        before each write, in the background.
        """
        self.config, self.context, self.model, self.rank = config, context, model, context.env.rank
        self.blocker, self.before_write = blocker, before_write
        self.store = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep_last)
        self._reserved = False  # the memory of copies

    def restore(self, target: Stateful) -> Path | None:
        """Load the checkpoint that ``checkpoint.resume`` selects, and return its path; None without one.

        Rank 0 reads it. Raise UserError, on every rank, if training cannot resume from it.
        """
        selected: tuple[Path, State] | None = None
        with raise_on_all_ranks():
            if self.rank == 0:
                self.store.remove_temporary_files()
                selected = choose_resumable(self.config, self.store, self.model)
                self.store.repair_last()
        path = broadcast_object(selected and selected[0])
        if path is None:
            return None
        state = broadcast_state(selected[1] if selected else {}, self.context.broadcast_device)
        load_model(self.model, state, path)
        try:
            target.load_state_dict(state)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(
                f"checkpoint {path}: holds a network, but no state from which training can resume "
                f"({type(error).__name__}: {error}); give another, or only evaluate it"
            ) from error
        return path

    def reserve(self, source: Stateful) -> None:
        """Have rank 0 allocate memory, so that the first save stops training no longer than later ones.

        The first call does that, when the optimizer has its state. Other calls do nothing.
        """
        if self._reserved:
            return
        self._reserved = True
        state = source.state_dict()  # collective
        if self.rank == 0:
            self.store.reserve(state)

    def save(self, source: Stateful, best: bool = False, optional: bool = False) -> str | None:
        """Have rank 0 write a checkpoint in the background; skip an ``optional`` one if it is still writing another.

        Return the reason if none may be written now.
        """
        state = source.state_dict()  # collective
        failure = self.blocker()  # collective
        if failure is None and self.rank == 0 and not (optional and self.store.busy):
            self.store.save(state, best, before=self.before_write)
        return failure

    def save_and_exit(self, source: Stateful, step: int, preemption: Preemption) -> NoReturn:
        """Save after ``step`` steps, and end the run as a signal requested. Raise Preempted on every rank."""
        self._extend_timeout()
        failure = self.save(source)
        if self.rank == 0:
            failure = failure or self.store.wait(preemption.seconds_left())
        by = preemption.requested_by or "a signal to another rank"
        failure, by, status = broadcast_object((failure, by, preemption.status))
        outcome = f"NOT saved ({failure})" if failure else "saved"
        raise Preempted(f"stopped by {by} after step {step}, {outcome}; run the same command again to resume", status)

    def finish(self, failure: str | None = None) -> None:
        """Wait until the last checkpoint is on the disk; ``failure`` is what its ``save`` returned.

        Raise UserError, on every rank, if it is not written.
        """
        self._extend_timeout()
        failure = broadcast_object(failure or (self.store.wait() if self.rank == 0 else None))
        if failure:
            raise UserError(f"the trained network is not saved: {failure}; fix that and run the same command again")

    def _extend_timeout(self) -> None:
        """Let the watchdog wait for a write as long as for the start."""
        self.context.watchdog.set_timeout(self.config.distributed.init_timeout_s, "distributed.init_timeout_s")

    def close(self) -> None:
        """Let a write in progress end, also after an error. Not a collective."""
        self.store.wait(self.config.checkpoint.preemption_grace_s)
