"""The training loop, and the state that one checkpoint holds."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlenet import __version__
from distlenet.checkpoint.format import State
from distlenet.checkpoint.manager import CheckpointManager
from distlenet.config.loading import identity
from distlenet.config.schema import Config
from distlenet.data.sample_log import NoSampleLog, open_sample_log
from distlenet.data.sources import ImageData
from distlenet.distributed.collectives import any_rank, hosts_of_ranks, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.preemption import Preemption
from distlenet.reduction.replica_check import check_replicas
from distlenet.tracking.base import Record, Tracker
from distlenet.tracking.wandb import wandb_mode
from distlenet.training.data_pipeline import Feed
from distlenet.training.error_analysis import Details, write_details
from distlenet.training.evaluation import evaluate
from distlenet.training.meter import Metrics
from distlenet.training.nonfinite_report import stop_or_skip
from distlenet.training.starts import process_age_s, record_start, run_id
from distlenet.training.state import TrainState
from distlenet.training.throughput import Throughput
from distlenet.training.train_step import TrainStep

ASK_EVERY = 16
"""Batches of an evaluation between two looks whether any rank was asked to stop."""


class Trainer:
    """Train ``config.model`` on ``data`` as one rank of ``context``."""

    def __init__(
        self,
        config: Config,
        context: DistributedContext,
        data: ImageData,
        folder: Path,
        tracker: Tracker,
        preemption: Preemption,
    ) -> None:
        """Build every part. Raises UserError for settings that do not fit each other, data or ranks."""
        self.config, self.context, self.folder, self.tracker = config, context, folder, tracker
        self.preemption, self.watchdog = preemption, context.watchdog
        self.env, self.device = context.env, context.device
        self.feed = feed = Feed(config, context, data)
        self.sampler = feed.sampler
        train = config.train
        epochs_steps = train.epochs * feed.sampler.steps
        self.total_steps = min(epochs_steps, train.max_steps or epochs_steps)
        self.take_step = TrainStep(config, context, feed.prepare, self.total_steps)
        self.net, self.reduction, self.meter = self.take_step.net, self.take_step.reduction, self.take_step.meter
        self.hosts = hosts_of_ranks()
        self.speed = Throughput(self.device, self.hosts)
        self.reduction.marks.ready, self.reduction.marks.reduced = self.speed.ready, self.speed.reduced
        self.checkpoint_every = config.checkpoint.every_steps or self.total_steps
        self.check_replicas_every = train.check_replicas_every or self.total_steps

        self.checkpointer = CheckpointManager(config, context, folder, tracker)
        self.ledger = NoSampleLog()
        self.resumed_from: Path | None = None
        resume = config.checkpoint.resume
        self.at = TrainState(
            micro_batch=self.reduction.micro_batch_size,
            started_from=resume if resume not in ("auto", "never") else None,
        )

    def fit(self) -> Record:
        """Train from the newest checkpoint, or from scratch, to the last step; return the results.

        Raises Preempted where the job was asked to stop: then a checkpoint holds all that was done.
        """
        self.start()
        at = self.at
        while at.evaluated < self.total_steps:
            self.sampler.set_position(at.epoch, at.batch, most=self.total_steps - at.step)
            self.speed.start()
            for batch in self.speed.loading(self.feed.train):
                self.train_step(*batch)
                if at.step % self.check_replicas_every == 0:
                    check_replicas(self.net)  # collective, host sync
                if at.batch % self.config.train.log_every == 0:
                    self.check()  # host sync
                    self.log("train", self.meter.window(), **self.measured())  # collective, host sync
                if self.reduction.heard.yes:
                    self.checkpointer.stop(self, self.preemption)  # collective
                if at.step % self.checkpoint_every == 0 and at.batch < self.sampler.steps:
                    self.checkpointer.save(self, must=False)  # collective; an epoch's end is saved below
            self.check()  # host sync
            trained = self.meter.total()  # collective, host sync
            self.speed.stop()
            tested = self.evaluate()  # collective, host sync
            if complete := at.batch == self.sampler.steps:  # else train.max_steps ended it
                self.log("train_epoch", trained)
                self.meter.reset()
            self.log("test", tested)
            best = at.take_test(tested)
            if complete:
                at.epoch, at.batch = at.epoch + 1, 0
            self.checkpointer.save(self, best)  # collective
        self.checkpointer.finish()  # collective
        progress = {"epochs": at.epoch, "steps": at.step, "skipped_steps": at.skipped, "restarts": at.restarts}
        times = {"train_images_per_s": self.speed.mean(), "train_s": self.speed.seconds, "start_s": self.start_s}
        return {**at.test, **progress, **times, **self.context.describe()}

    def start(self) -> None:
        """Go on from a checkpoint, or begin; tell everybody. A collective."""
        self.resumed_from = self.checkpointer.restore(self)
        own = self.resumed_from is None or self.folder.resolve() in self.resumed_from.resolve().parents
        settings = identity(self.config)
        self.at.run_id = run_id(self.folder, self.at.run_id if own else "", settings)
        self.take_step.settle(self.feed.no_images)
        check_replicas(self.net)  # all start alike, whatever their seeds or disks say
        if self.config.data.ledger:
            facts = {"samples": self.sampler.samples, "steps_per_epoch": self.sampler.steps}
            facts |= {"global_batch_size": self.sampler.global_batch, "world_size": self.env.world_size}
            self.ledger = open_sample_log(self.folder, self.at.step, facts, self.env.rank)
        with raise_on_all_ranks():
            if self.env.rank == 0:
                limit = self.config.checkpoint.max_restarts_without_progress
                record_start(self.folder, self.at.step, self.env.world_size, limit, self.at.run_id, settings)
            self.tracker.start(self.facts())
        self.watchdog.expect(self.config.distributed.step_timeout_s, "distributed.step_timeout_s")
        self.start_s = process_age_s()
        self.preemption.listen()  # before, there is nothing to save, and a signal ends the rank

    def train_step(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take one optimizer step on this rank's share of the next global batch.

        Images are uint8 (n, H, W), labels and indices int64 (n,); n is B/W, but in an epoch's last batch.
        """
        at = self.at
        count = self.sampler.count(at.batch)  # images of the global batch, over all ranks
        self.ledger.record(at.epoch, at.step, indices)
        self.take_step.measure = (at.batch + 1) % self.config.train.log_every == 0
        at.lr = self.take_step(images, labels, indices, at.epoch, at.step, count, self.preemption.asked)
        self.speed.done(count, len(labels))
        if self.take_step.refused:
            stop_or_skip(self.take_step, (images, labels, indices), at, at.step, count, self.folder)  # collective
        at.step += 1
        at.batch += 1
        self.watchdog.beat(at.step)

    def check(self) -> None:
        """Stop the run where the device has seen what is not finite. A host sync; where it has, a collective."""
        if (bad := self.take_step.guard.found()) is not None:
            place = self.at.batch - (self.at.step - bad)
            batch = self.feed.again(self.at.epoch, place)
            stop_or_skip(self.take_step, batch, self.at, bad, self.sampler.count(place), self.folder)
        self.take_step.check()

    def evaluate(self) -> Metrics:
        """Measure the bare network on the test set. A collective."""

        def asked(batch: int) -> bool:
            self.watchdog.beat(self.at.step)
            return batch % ASK_EVERY == ASK_EVERY - 1 and any_rank(self.preemption.asked, self.device)

        feed, autocast = self.feed, self.context.autocast()
        details = Details(len(feed.data.classes), self.device) if self.at.step >= self.total_steps else None
        metrics = evaluate(self.net, feed.test, feed.prepare, autocast, self.device, feed.test_count, asked, details)
        if metrics is None:
            self.checkpointer.stop(self, self.preemption)
        if details is not None:
            confusion, mistakes = details.reduce()  # collective, host sync
            if self.env.rank == 0:
                write_details(self.folder, confusion, mistakes, feed.data.test.images, feed.data.classes)
        return metrics

    def measured(self) -> Record:
        """Return what a training record says beside loss and accuracy. A collective, then a host sync."""
        record = {**self.speed.window(), "grad_norm": float(self.take_step.grad_norm)}  # host sync
        if self.take_step.scaler.is_enabled():
            record["loss_scale"] = self.take_step.scaler.get_scale()
        if self.device.type == "cuda":
            record["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return record

    def log(self, split: str, metrics: Metrics, **more: Any) -> None:
        """Tell the tracker one record; see ``distlenet.tracking.base``."""
        place = {"split": split, "step": self.at.step, "epoch": self.at.epoch + 1, "batch": self.at.batch}
        place["time"] = round(time.time(), 3)
        self.tracker.log({**place, **metrics.to_dict(), "lr": self.at.lr, **more})

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on: tensors and plain values. A collective.

        Raises UserError where it is not finite: that is never saved.
        """
        self.check()  # host sync
        prepare, data = self.feed.prepare, self.feed.data
        return {
            **self.at.state_dict(),
            **self.take_step.state_dict(),
            "config": self.config.to_dict(),
            "input": {"mean": prepare.mean, "std": prepare.std, "size": data.test.images.shape[1]},
            "classes": list(data.classes),
            "versions": {"distlenet": __version__, "torch": str(torch.__version__)},
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a saved state, of any number of ranks."""
        self.take_step.load_state_dict(state)
        started_from = self.at.started_from
        self.at.load_state_dict(state)
        self.at.started_from = started_from or self.at.started_from
        if self.at.batch > self.sampler.steps or self.at.micro_batch < 1:
            raise ValueError(f"batch {self.at.batch} of {self.sampler.steps}, micro-batches of {self.at.micro_batch}")
        self.reduction.limit_micro_batch(self.at.micro_batch)

    def facts(self) -> Record:
        """Return what a tracker tells about the run before its first step."""
        return {
            "version": __version__,
            "run": self.folder.name,
            "run_id": self.at.run_id,
            "hosts": self.hosts,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "step": self.at.step,
            "steps": self.total_steps,
            "evaluated": self.at.evaluated,
            "complete": self.at.evaluated >= self.total_steps,
            "epochs": self.config.train.epochs,
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batches": self.reduction.micro_batches_per_rank,
            "micro_batch_size": self.reduction.micro_batch_size,
            "reduction": self.config.distributed.reduction,
            "resumed_from": self.resumed_from and str(self.resumed_from),
            "wandb": wandb_mode(self.config.wandb.mode, os.environ),
            **self.feed.describe(),
            **self.context.describe(),
        }
