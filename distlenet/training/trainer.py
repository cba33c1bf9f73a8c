"""The training loop."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from distlenet import __version__
from distlenet.checkpoint.format import State
from distlenet.checkpoint.manager import CheckpointManager
from distlenet.config.loading import identity, settings_to_save
from distlenet.config.profiled_steps import profiled_steps
from distlenet.config.schema import Config
from distlenet.data.batched_dataset import ResidentBatch
from distlenet.data.loader import first_test_batch, make_loaders
from distlenet.data.sample_log import SampleLog, open_sample_log
from distlenet.distributed.collectives import any_rank, from_rank_0, hosts_of_ranks, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import Preemption
from distlenet.reduction.global_statistics import check_global_statistics
from distlenet.reduction.replica_check import check_replicas
from distlenet.task import Batch, Task, datasets_of
from distlenet.tracking.base import Record, Tracker
from distlenet.training.evaluator import EvaluationStopped, Evaluator, check_error_analysis
from distlenet.training.meter import Metrics
from distlenet.training.network_files import NetworkFiles
from distlenet.training.nonfinite_report import handle_nonfinite
from distlenet.training.origin import check_origin, origin_of
from distlenet.training.profiling import StepProfiler
from distlenet.training.records import measurements, run_info, summary
from distlenet.training.selection import Selection
from distlenet.training.starts import choose_run_id, count_starts, record_start
from distlenet.training.state import TrainState
from distlenet.training.step_result import StepResult
from distlenet.training.throughput import Throughput
from distlenet.training.train_step import TrainStep


class Trainer:
    """Train ``task`` as one rank of ``context``."""

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        task: Task,
        run_dir: Path,
        tracker: Tracker,
        preemption: Preemption,
    ) -> None:
        """Build all parts. Raise UserError for settings that do not fit each other, data or ranks. A collective."""
        self.config, self.context, self.task, self.run_dir = config, context, task, run_dir
        self.tracker, self.preemption = tracker, preemption
        self.env, self.device, self.watchdog = context.env, context.device, context.watchdog
        datasets = datasets_of(task)
        self.selection = Selection(config, datasets.validation is not None)
        self.loader, evaluation_loaders = make_loaders(config, context, datasets, task)
        self.sampler, self.data_source = self.loader.sampler, datasets.source
        epochs_steps = config.train.epochs * self.sampler.steps
        self.total_steps = min(epochs_steps, config.train.max_steps or epochs_steps)
        profiled = profiled_steps(config.train.profile_steps)
        all_ranks = config.train.profile_all_ranks
        self.profiler = StepProfiler(profiled, self.total_steps, self.env.rank, self.device, run_dir, all_ranks)
        check_global_statistics(config, self.env.world_size, self.sampler.global_size(self.sampler.steps - 1))
        example, share = self.loader.sample_batch().inputs(task), len(self.sampler.rank_offsets)
        self.train_step = TrainStep(config, context, task, self.total_steps, example, share)
        on_device = self.train_step.on_device
        self.model, self.meter, self.reducer = on_device.model, on_device.meter, on_device.reducer
        self.origin = origin_of(config, task, self.model, datasets)
        self.evaluator = Evaluator(on_device.outline, evaluation_loaders, context, preemption, run_dir)
        test_batch = first_test_batch(config, self.device, datasets, task)
        check_error_analysis(on_device.outline, self.model, test_batch, context)
        if not on_device.outline.predicts:  # else the names are known after the first evaluation
            self.selection.check_names(on_device.outline.metric_names)
        self.network_files = NetworkFiles(config, context, on_device, datasets, run_dir)
        self.throughput = Throughput(self.device, hosts_of_ranks())
        self.checkpoints = CheckpointManager(
            config, context, run_dir, self.model, blocker=self._unwritten_sample_log, before_write=tracker.sync
        )
        self.sample_log = SampleLog()
        self.resumed_from: Path | None = None
        self.initialised_from: Path | None = None
        resume = config.checkpoint.resume
        self.state = TrainState(
            micro_batch=self.reducer.micro_batch_size,
            started_from=resume if resume not in ("auto", "never") else None,
        )

    def fit(self, begin_s: float | None = None) -> Record:
        """Train from the newest checkpoint, or from scratch, to the last step; return the summary.

        Its ``start_s`` counts from ``begin_s``, a time of ``time.monotonic``, or from the call. Raise Preempted if a
        stop was requested: then a checkpoint holds everything done so far.
        """
        begin_s = time.monotonic() if begin_s is None else begin_s
        self.start()
        start_s = time.monotonic() - begin_s
        not_saved: str | None = None
        while not self.complete:
            self.train_epoch()
            not_saved = self.finish_epoch()
        self.checkpoints.finish(not_saved)  # collective
        self.network_files.write_embeddings()
        return summary(self.state, self.selection, self.throughput, start_s, self.context)

    @property
    def complete(self) -> bool:
        """Whether the run has ended, after its last step or early."""
        return self.state.evaluated >= self.total_steps or self.selection.stops(self.state.best)

    def train_epoch(self) -> None:
        """Train to the end of the epoch, or of the run."""
        first, config = self.state.batch, self.config
        batches = self.loader.epoch(self.state.epoch, start=first, stop=first + self.total_steps - self.state.step)
        self.throughput.start()
        for batch in self.profiler.follow(self.throughput.time_loading(batches), self.state.step):
            result = self.step(batch)  # collective
            self.checkpoints.reserve(self)  # after the first step only: collective, host sync
            if self.due(config.train.check_replicas_every):
                check_replicas(self.model)  # collective, host sync
            if self.logs_after(batch):
                self.check_finite()  # host sync
                self.log(
                    "train",
                    self.meter.window(),
                    **measurements(self.throughput, self.train_step.on_device.scaler, result, self.state.skipped),
                )  # collective, host sync
            if result.stop:
                self.checkpoints.save_and_exit(self, self.state.step, self.preemption)  # collective
            ends = self.state.batch == self.sampler.steps or self.state.step == self.total_steps
            if self.due(config.checkpoint.every_steps) and not ends:  # the end is saved by finish_epoch
                self.checkpoints.save(self, optional=True)  # collective
        self.check_finite()  # host sync
        self.throughput.stop()

    def step(self, batch: Batch | ResidentBatch) -> StepResult:
        """Take one optimizer step on this rank's share of a global batch. A collective."""
        step, stop = self.state.step, self.preemption.stop_requested
        self.sample_log.record(batch.epoch, step, batch.indices)
        result = self.train_step(batch, step, stop, want_grad_norm=self.logs_after(batch))
        self.throughput.add(batch, result)
        self.state = self.state.advance(result.lr, result.skipped)
        if result.skipped:
            loaded = batch if isinstance(batch, Batch) else self.loader.batch(batch.epoch, batch.number)
            handle_nonfinite(self.train_step, loaded, step, self.state.skipped, self.run_dir)  # collective
        self.watchdog.heartbeat(self.state.step)
        return result

    def finish_epoch(self) -> str | None:
        """Log, evaluate and save at the end of an epoch, or of the run. A collective.

        Return the reason if no checkpoint may be written now.
        """
        trained = self.meter.total()  # collective, host sync
        evaluated, state = self.evaluate()  # collective, host sync
        if ends_epoch := self.state.batch == self.sampler.steps:  # otherwise train.max_steps ended it
            self.log("train_epoch", trained)
            self.meter.reset()
        for split, metrics in evaluated.items():
            self.log(split, metrics)
        self.state = state.next_epoch() if ends_epoch else state
        if self.complete and not self.due(self.config.train.check_replicas_every):  # otherwise just checked
            check_replicas(self.model)  # collective, host sync
        return self.checkpoints.save(self, self.selection.is_best(state.best))  # collective

    def evaluate(self) -> tuple[dict[str, Metrics], TrainState]:
        """Evaluate the model, or its average, on all splits; return metrics by split and the next state. A collective.

        If a rank has a stop request, save and exit: a resumed run repeats the evaluation.
        """
        state, evaluated, best = self.state, {}, self.state.best
        model = self.train_step.on_device.evaluated_model()
        self.train_step.on_device.seed(state.step, 0)  # of dropout in an evaluation: replayed steps leave it as it was
        try:
            for split in self.evaluator.loaders:
                ends = state.step >= self.total_steps or self.selection.stops(best)
                analyse = split == "test" and ends
                evaluated[split] = self.evaluator.evaluate(split, model, state.step, analyse)  # collective
                if split == "val":
                    best = self.selection.update(best, evaluated[split], state.step)
        except EvaluationStopped:
            self.checkpoints.save_and_exit(self, state.step, self.preemption)  # collective
        return evaluated, state.with_evaluation(evaluated, best)

    def start(self) -> None:
        """Resume from a checkpoint, or start from scratch; report it. A collective."""
        self.resumed_from = self.checkpoints.restore(self)
        if self.resumed_from is None and self.config.checkpoint.init_from is not None:
            init_from = self.config.checkpoint.init_from
            self.initialised_from = self.train_step.load_initial_weights(init_from)  # collective
        own = self.resumed_from is None or self.run_dir.resolve() in self.resumed_from.resolve().parents
        saved_id, settings = self.state.run_id if own else "", f"{identity(self.config)}-{self.origin.digest()}"
        run_id, restarts = from_rank_0(  # collective: other ranks may not see its directory
            lambda: (choose_run_id(self.run_dir, saved_id, settings), count_starts(self.run_dir))
        )
        self.state = replace(self.state, run_id=run_id, restarts=restarts)
        self.train_step.warm_up()  # collective
        check_replicas(self.model)  # collective: all ranks start with the same weights
        if self.config.data.ledger:
            sizes = {"samples": self.sampler.samples, "steps_per_epoch": self.sampler.steps}
            sizes |= {"global_batch_size": self.sampler.global_batch_size, "world_size": self.env.world_size}
            self.sample_log = open_sample_log(self.run_dir, self.state.step, sizes, self.env.rank)  # collective
        with raise_on_all_ranks():
            if self.env.rank == 0:
                limit = self.config.checkpoint.max_restarts_without_progress
                record_start(self.run_dir, self.state.step, self.env.world_size, limit, self.state.run_id, settings)
            self.network_files.write_inputs(self.loader)
            self.tracker.start(run_info(self))
        if not self.config.model.compile:  # otherwise a step may compile for minutes
            self.watchdog.set_timeout(self.config.distributed.step_timeout_s, "distributed.step_timeout_s")
        self.preemption.install()  # before, there is nothing to save, and a signal ends the rank (utils/startup.py)

    def due(self, interval: int | None) -> bool:
        """Return whether something is due after this step; without an interval it never is."""
        return interval is not None and self.state.step % interval == 0

    def logs_after(self, batch: Batch | ResidentBatch) -> bool:
        """Return whether a training record follows the step on ``batch``."""
        return (batch.number + 1) % self.config.train.log_every == 0

    def check_finite(self) -> None:
        """Raise UserError, on every rank, if something is not finite. A host sync; if so, a collective."""
        flags = self.train_step.on_device.flags
        if flags is not None and (bad_step := flags.first_bad_step()) is not None:
            number = self.state.batch - (self.state.step - bad_step)
            batch = self.loader.batch(self.state.epoch, number)
            handle_nonfinite(self.train_step, batch, bad_step, self.state.skipped + 1, self.run_dir)
        self.train_step.check_finite()

    def _unwritten_sample_log(self) -> str | None:
        """Return why no checkpoint may be written: a run resumed from it would miss lines forever. A collective."""
        unwritten = self.config.data.ledger and any_rank(not self.sample_log.flush(), self.device)
        return "lines of a rank's ledger could not be written" if unwritten else None

    def log(self, split: str, metrics: Metrics, **more: float) -> None:
        """Log one record; see ``distlenet.tracking.base``."""
        record = {"split": split, "step": self.state.step, "epoch": self.state.epoch + 1, "batch": self.state.batch}
        record["time"] = round(time.time(), 3)
        self.tracker.log({**record, **metrics.to_dict(), "lr": self.state.lr, **more})

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on: tensors and plain values. A collective.

        Raise UserError if it is not finite: such a state is never saved.
        """
        self.check_finite()  # host sync
        return {
            **self.state.state_dict(),
            **self.train_step.state_dict(),
            "config": settings_to_save(self.config),
            "origin": self.origin.to_dict(),
            "task": self.task.state_dict(),
            "versions": {"distlenet": __version__, "torch": str(torch.__version__)},
        }

    def load_state_dict(self, state: State) -> None:
        """Load a saved state, of any number of ranks, except the weights. A collective."""
        check_origin(state.get("origin"), self.origin, self.config, state.get("batch", 0))
        self.train_step.load_state_dict(state)
        saved = TrainState.from_state_dict(state)
        if saved.batch > self.sampler.steps or saved.micro_batch < 1:
            raise ValueError(f"batch {saved.batch} of {self.sampler.steps}, micro-batches of {saved.micro_batch}")
        self.state = replace(saved, started_from=self.state.started_from or saved.started_from)
        if not self.config.model.sync_batchnorm:  # its statistics need the whole share at once
            self.reducer.cap_micro_batch_size(saved.micro_batch)

    def close(self) -> None:
        """Release what the process group must not outlive, and let a write in progress end. Not a collective."""
        self.checkpoints.close()
        self.sample_log.close()
        self.profiler.close()
        self.train_step.close()
        self.loader.close()  # last: a worker that is reading may take seconds to end
