"""The training loop, and the state that one checkpoint holds."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from distlenet import __version__
from distlenet.checkpoint import CheckpointFolder, State, choose_resumable, load_model
from distlenet.data.augment import Prepare
from distlenet.data.loader import make_loader
from distlenet.data.sampler import GlobalBatchSampler, ShardSampler
from distlenet.data.sources import ImageData
from distlenet.distributed import all_or_none, from_rank_0
from distlenet.errors import UserError
from distlenet.exact import seed_micro_batch
from distlenet.metrics import EVAL_BATCH, Meter, Metrics, Speed, evaluate
from distlenet.net import NETS
from distlenet.optim import load_optimizer, make_optimizer, make_schedule
from distlenet.precision import make_scaler
from distlenet.reduction import make_reduction
from distlenet.replicas import check_replicas
from distlenet.schema import Config
from distlenet.session import Session
from distlenet.tracking import Record, Tracker
from distlenet.tracking.ledger import Ledger, NoLedger, open_start


class Trainer:
    """Train ``config.model`` on ``data`` as one rank of ``session``."""

    def __init__(self, config: Config, session: Session, data: ImageData, folder: Path, tracker: Tracker) -> None:
        """Build every part. Raises UserError for settings that do not fit each other, data or ranks."""
        self.config, self.session, self.tracker = config, session, tracker
        self.world, self.device = world, device = session.world, session.device
        train = config.train

        place = (world.rank, world.world_size)
        self.sampler = GlobalBatchSampler(
            data.train, train.global_batch_size, *place, config.seed, config.data.drop_last
        )
        self.train_loader = make_loader(data.train, self.sampler, config.data.workers, device)
        shard = ShardSampler(len(data.test), EVAL_BATCH, *place)
        self.test_loader = make_loader(data.test, shard, 0, device)
        self.test_count = len(data.test)
        self.data_source = data.source
        self.prepare = Prepare(data.train.images, config.data.augment, config.seed)

        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.net = NETS[config.model.name]().to(device)
        self.optimizer = make_optimizer(config.optim, self.net)
        epochs_steps = train.epochs * self.sampler.steps
        self.total_steps = min(epochs_steps, train.max_steps or epochs_steps)
        if (config.optim.warmup_steps or 0) >= self.total_steps:
            raise UserError(
                f"optim.warmup_steps={config.optim.warmup_steps}: the run has {self.total_steps} steps; give fewer"
            )
        self.schedule = make_schedule(config.optim, self.optimizer, self.total_steps)
        self.autocast = session.autocast()
        self.scaler = make_scaler(session.precision, device)
        self.reduction = make_reduction(config, self.net, world, watch=not self.scaler.is_enabled())
        self.meter = Meter(device)
        self.speed = Speed()
        self.label_smoothing = train.label_smoothing
        self.checkpoint_every = config.checkpoint.every_steps or self.total_steps
        self.check_replicas_every = train.check_replicas_every or self.total_steps

        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.checkpoint.keep)
        self.ledger = NoLedger()
        self.resumed_from: Path | None = None
        resume = config.checkpoint.resume
        self.started_from = resume if resume not in ("auto", "never") else None
        self.step = 0  # optimizer steps done, over all epochs
        self.epoch = 0  # epochs done
        self.batch = 0  # global batches done in the epoch under way
        self.test: Record = {}  # metrics of the last evaluation
        self.best_accuracy = -1.0
        self.lr = config.optim.lr  # of the last step

    def fit(self) -> Record:
        """Train from the newest checkpoint, or from scratch, to the last step; return the results."""
        self.restore()
        while self.step < self.total_steps:
            self.sampler.set_position(self.epoch, self.batch)
            self.speed.start()
            for images, labels, indices in self.train_loader:  # (n, H, W), (n,), (n,); n = B/W, but for the last
                self.train_step(images, labels, indices)
                if self.step % self.check_replicas_every == 0:
                    check_replicas(self.net)  # collective, host sync
                if self.batch % self.config.train.log_every == 0:
                    self.reduction.check()  # host sync
                    metrics = self.meter.window()  # collective, host sync
                    self.log("train", metrics, images_per_s=self.speed.window())
                if self.step == self.total_steps:
                    break
                if self.step % self.checkpoint_every == 0 and self.batch < self.sampler.steps:
                    self.save()  # collective; the end of an epoch is saved below, with its records
            self.reduction.check()  # host sync
            metrics = self.meter.total()  # collective, host sync
            self.speed.stop()
            if complete := self.batch == self.sampler.steps:  # else train.max_steps ended it
                self.log("train_epoch", metrics)
                self.meter.reset()
            best = self.evaluate()  # collective, host sync
            if complete:
                self.epoch, self.batch = self.epoch + 1, 0
            self.save(best)  # collective
        self.ledger.close()
        results = {"epochs": self.epoch, "steps": self.step, "train_images_per_s": self.speed.mean()}
        return {**self.test, **results, **self.session.describe()}

    def train_step(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Take one optimizer step on this rank's share of the next global batch.

        Every image of the global batch weighs the same, however the batch is cut: losses are summed, not
        averaged, and divided by the images of the global batch. So neither a short last batch, nor a short
        last micro-batch, nor a rank with fewer images or none changes the gradient.
        """
        self.lr = float(self.schedule.get_last_lr()[0])
        count = self.sampler.count(self.batch)  # images of the global batch, over all ranks
        self.ledger.record(self.epoch, self.step, indices)
        images, labels, indices = (t.to(self.device, non_blocking=True) for t in (images, labels, indices))
        inputs = self.prepare.augmented(images, indices, self.epoch)  # (n, 1, 32, 32)
        losses, outputs, answers = [], [], []
        micro_batches = self.reduction.micro_batches(inputs, labels)
        for shard, (x, y) in micro_batches:
            seed_micro_batch(self.device, self.config.seed, self.step, shard)
            with self.reduction.accumulate(last=shard == micro_batches[-1][0]):
                with self.autocast:
                    logits = self.reduction.model(x).float()
                loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=self.label_smoothing)
                self.scaler.scale(loss * (self.reduction.weight / count)).backward()
            losses.append(loss.detach())
            outputs.append(logits.detach())
            answers.append(y)
        self.meter.update(torch.stack(losses), torch.cat(outputs), torch.cat(answers))
        self.reduction.finish(self.step)  # collective
        if self.config.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.net.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()  # host sync, with fp16 only
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() >= scale:  # a smaller scale: the gradient overflowed, the step was skipped
            self.schedule.step()
        self.speed.add(count)
        self.step += 1
        self.batch += 1

    def evaluate(self) -> bool:
        """Measure the bare network on the test set; return whether it is the best yet. A collective."""
        metrics = evaluate(self.net, self.test_loader, self.prepare, self.autocast, self.device, self.test_count)
        self.test = {f"test_{name}": value for name, value in metrics.to_dict().items()}
        self.log("test", metrics)
        best = metrics.accuracy > self.best_accuracy
        self.best_accuracy = max(metrics.accuracy, self.best_accuracy)
        return best

    def log(self, split: str, metrics: Metrics, **more: float) -> None:
        """Tell the tracker one record; see ``distlenet.tracking``."""
        place = {"split": split, "step": self.step, "epoch": self.epoch + 1, "batch": self.batch}
        self.tracker.log({**place, **metrics.to_dict(), "lr": self.lr, **more})

    def save(self, best: bool = False) -> None:
        """Write a checkpoint from rank 0. A collective; raises UserError where it cannot be written."""
        self.reduction.check()  # what is not finite is never saved
        state = self.state_dict()
        state["started_from"] = self.started_from
        with all_or_none():
            if self.world.rank == 0:
                self.tracker.sync()
                self.checkpoints.save(state, best)

    def restore(self) -> None:
        """Go on from where ``checkpoint.resume`` says: rank 0 reads, all take it. A collective."""
        found: tuple[Path, State] | None = None
        with all_or_none():
            if self.world.rank == 0:
                self.checkpoints.remove_torn()
                found = choose_resumable(self.config, self.checkpoints, self.net)
        found = from_rank_0(found)
        if found is not None:
            self.resumed_from, state = found
            load_model(self.net, state, self.resumed_from)
            try:
                self.load_state_dict(state)
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(
                    f"checkpoint {self.resumed_from}: holds a network, but no state that training can go on from "
                    f"({type(error).__name__}: {error})"
                ) from error
        check_replicas(self.net)  # all start alike, whatever their seeds or disks say
        if self.config.data.ledger:
            self.ledger = self.open_ledger()
        with all_or_none():
            self.tracker.start(self.facts())

    def open_ledger(self) -> Ledger:
        """Open this rank's ledger of the samples it takes from now on. A collective."""
        folder = None
        if self.world.rank == 0:
            facts = {"samples": self.sampler.samples, "steps_per_epoch": self.sampler.steps}
            facts |= {"global_batch_size": self.sampler.global_batch, "world_size": self.world.world_size}
            folder = open_start(self.checkpoints.folder.parent, self.step, facts)
        return Ledger(from_rank_0(folder) or Path(), self.world.rank)

    def state_dict(self) -> State:
        """Return everything that the rest of the run depends on: tensors and plain values. A collective."""
        return {
            "model": {name: tensor.detach().cpu() for name, tensor in self.net.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "test": self.test,
            "best_accuracy": self.best_accuracy,
            "config": self.config.to_dict(),
            "versions": {"distlenet": __version__, "torch": str(torch.__version__)},
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a saved state, of any number of ranks."""
        load_optimizer(self.optimizer, self.schedule, state)
        if state["scaler"]:  # empty where the run was not fp16 so far: then the loss scale starts anew
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], self.world.rank)
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.test, self.best_accuracy = state["test"], state["best_accuracy"]
        self.started_from = self.started_from or state.get("started_from")

    def facts(self) -> Record:
        """Return what a tracker tells about the run before its first step."""
        return {
            "version": __version__,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "train_count": self.sampler.samples,
            "data_source": self.data_source,
            "step": self.step,
            "steps": self.total_steps,
            "epochs": self.config.train.epochs,
            "steps_per_epoch": self.sampler.steps,
            "global_batch_size": self.config.train.global_batch_size,
            "micro_batches": self.reduction.micro_batches_per_rank,
            "micro_batch_size": self.reduction.micro_batch_size,
            "reduction": self.config.distributed.reduction,
            "resumed_from": self.resumed_from and str(self.resumed_from),
            **self.session.describe(),
        }
