"""One optimizer step, and everything it changes."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from distlenet.checkpoint.format import State
from distlenet.config.schema import Config
from distlenet.data.transforms import Prepare
from distlenet.distributed.collectives import any_rank
from distlenet.distributed.context import DistributedContext
from distlenet.distributed.precision import make_scaler
from distlenet.models.registry import make_model
from distlenet.reduction import make_reducer
from distlenet.training.cuda_graph import GraphedStep, is_recorded
from distlenet.training.meter import Meter
from distlenet.training.nonfinite_guard import Guard
from distlenet.training.optimizers import load_optimizer, make_optimizer, make_schedule
from distlenet.utils.errors import UserError, warn
from distlenet.utils.keyed_random import seed_micro_batch
from distlenet.utils.structure import check_same_structure

MEND = "give a smaller optim.lr, a longer optim.warmup_steps or train.max_grad_norm, and look at the data"


class TrainStep:
    """Network, optimizer, schedule, loss scale, reduction and meter; a call is one optimizer step."""

    def __init__(self, config: Config, context: DistributedContext, prepare: Prepare, total_steps: int) -> None:
        """Build every part. Raises UserError for settings that do not fit each other or the ranks."""
        self.config, self.context, self.device = config, context, context.device
        self.prepare = prepare
        if (config.optim.warmup_steps or 0) >= total_steps:
            raise UserError(
                f"optim.warmup_steps={config.optim.warmup_steps}: the run has {total_steps} steps; give fewer than that"
            )
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.net = make_model(config.model.name, config.model.channels_last, self.device)
        self.scaler = make_scaler(context.precision, self.device)
        self.optimizer = make_optimizer(config.optim, self.net, loss_scaling=self.scaler.is_enabled())
        self.schedule = make_schedule(config.optim, self.optimizer, total_steps)
        self.autocast = context.autocast()
        self.reduction = make_reducer(config, self.net, context.env, watch=not self.scaler.is_enabled())
        lag = self.device.type == "cuda" and config.train.on_nonfinite == "stop"
        self.guard = Guard(self.optimizer, self.device, lag, self.scaler.is_enabled())
        self.refused = False  # whether the last step was not taken, since not finite
        self.meter = Meter(self.device)
        self.measure = False  # whether the next step is one whose gradient's norm is wanted
        self.grad_norm = torch.zeros((), device=self.device)
        self.graph: GraphedStep | None = None
        self.no_inputs = torch.empty(0)  # until it has settled

    def settle(self, no_images: Tensor) -> None:
        """Get ready, with all that is restored in place; ``no_images`` is uint8 (0, H, W). A collective."""
        self.no_inputs = self.prepare(no_images)
        self.reduction.settle(self.no_inputs)
        if self.config.train.cuda_graph == "auto":
            reason = self.why_no_graph()
            if any_rank(reason is not None, self.device):  # with unequal shares, ranks may differ; a collective
                if self.context.env.rank == 0:
                    warn(f"train.cuda_graph=auto: no graph, since {reason or 'another rank cannot have one'}")
            else:
                self.graph = GraphedStep(self.optimizer, self.config.train.global_batch_size, self.device)

    def __call__(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int, step: int, count: int, asked: bool
    ) -> float:
        """Take optimizer step ``step`` on this rank's share of a global batch; return its learning rate.

        ``count`` is the number of images of the global batch, over all ranks; ``asked`` says that this rank was
        asked to stop. No host sync on a GPU, but with fp16 or ``train.on_nonfinite=skip``.
        """
        lr = float(self.schedule.get_last_lr()[0])
        scale = self.scaler.get_scale()  # host sync, with fp16 only
        self.reduction.begin(asked)
        self.guard.begin(step)
        if self.graph is not None:
            self.graph.take(self, images, labels, indices, epoch, step, count)
        else:
            self.compute(images, labels, indices, epoch, step, count)
        self.reduction.hear()
        # A smaller scale: the gradient overflowed, the step was skipped.
        if not self.refused and self.scaler.get_scale() >= scale:
            self.schedule.step()
        return lr

    def compute(
        self, images: Tensor, labels: Tensor, indices: Tensor, epoch: int | Tensor, step: int, count: int
    ) -> None:
        """Do the device's part.

        Every image of the global batch weighs the same, however the batch is cut: losses are summed, not
        averaged, and divided by the images of the global batch. So neither a short last batch, nor a short
        last micro-batch, nor a rank with fewer images or none changes the gradient.
        """
        inputs = self.prepare.augmented(images, indices, epoch)  # (n, 1, 32, 32)
        losses, outputs, answers = [], [], []
        micro_batches = self.reduction.micro_batches(inputs, labels)
        for shard, (x, y) in micro_batches:
            self.seed(step, shard)
            with self.reduction.accumulate(last=shard == micro_batches[-1][0]):
                with self.autocast:
                    logits = self.reduction.model(x).float()
                loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=self.config.train.label_smoothing)
                self.reduction.backward(self.scaler.scale(loss * (self.reduction.weight / count)))
            losses.append(loss.detach())
            outputs.append(logits.detach())
            answers.append(y)
        self.reduction.finish()  # collective
        self.refused = self.guard.refuses(self.reduction.bad)
        if self.refused:
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.meter.update(torch.stack(losses), torch.cat(outputs), torch.cat(answers))
        max_grad_norm = self.config.train.max_grad_norm
        if self.measure or max_grad_norm is not None or is_recorded(self.device):
            self.scaler.unscale_(self.optimizer)
            norm = get_total_norm([p.grad for p in self.net.parameters() if p.grad is not None])
            self.grad_norm.copy_(norm)
            if max_grad_norm is not None:
                clip_grads_with_norm_(self.net.parameters(), max_grad_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def seed(self, step: int, shard: int | None = None) -> None:
        """Seed the generator for a micro-batch; without ``shard`` for the only one that this rank has."""
        if is_recorded(self.device):
            return  # seeded before each replay
        shard = self.context.env.rank if shard is None else shard
        seed_micro_batch(self.device, self.config.seed, step, shard)

    def begin_again(self) -> None:
        """Forget a step that broke off anywhere. A collective."""
        self.optimizer.zero_grad(set_to_none=True)
        self.reduction.begin_again(self.no_inputs)

    def close(self) -> None:
        """Let go of what the process group must not outlive."""
        if self.graph is not None:
            self.graph.close()

    def check(self) -> None:
        """Raise UserError, on every rank, where a parameter is not finite: no later step mends that. A host sync."""
        named = dict(self.net.named_parameters())
        finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
        if names := [name for name, is_finite in zip(named, finite, strict=True) if not is_finite]:
            raise UserError(f"{', '.join(names)}: not finite any more; {MEND}")

    def check_state(self, state: State) -> None:
        """Raise KeyError or ValueError where a state is not one that this step can go on from. A collective."""
        net = copy.deepcopy(self.net)
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        stepped = make_optimizer(self.config.optim, net, loss_scaling=self.scaler.is_enabled())
        stepped.step()  # makes the state that an optimizer has
        optimizer, like = state["optimizer"], stepped.state_dict()
        if optimizer["state"]:  # none, where every step was skipped
            check_same_structure(optimizer["state"], like["state"], "optimizer.state")
        # Its settings may have other names in another version of torch; all but these are the present run's.
        groups, right = ([group["params"] for group in of["param_groups"]] for of in (optimizer, like))
        if repr(groups) != repr(right):  # a tensor of 0 equals 0
            raise ValueError(f"optimizer.param_groups are of the parameters {str(groups)[:60]}")
        counts = {"last_epoch": 0, "_step_count": 0}
        check_same_structure({name: state["schedule"][name] for name in counts}, counts, "schedule")
        check_same_structure(state["meter"], self.meter.state_dict(), "meter")
        if state["scaler"] and self.scaler.is_enabled():
            check_same_structure(state["scaler"], self.scaler.state_dict(), "scaler")

    def why_no_graph(self) -> str | None:
        """Say why a step on this rank cannot be a CUDA graph."""
        if self.device.type != "cuda":
            return "there is no GPU"
        if self.context.backend != "nccl":
            return f"the collectives of distributed.backend={self.context.backend} run on the host"
        if self.scaler.is_enabled():
            return "with precision=fp16 the host must know whether a step was skipped"
        if not self.guard.lag:
            return "with train.on_nonfinite=skip the host must know whether a step was skipped"
        if self.reduction.micro_batches_per_rank > 1:
            return "a rank has several micro-batches per step, each with random numbers of its own"
        return None

    def state_dict(self) -> State:
        """Return what a checkpoint holds of it. A collective."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take up a saved state, of any number of ranks; the network's weights are loaded before. A collective.

        Raises ValueError where it is not built like this one's.
        """
        self.check_state(state)
        load_optimizer(self.optimizer, self.schedule, state)
        if state["scaler"]:  # empty where the run was not fp16 so far: then the loss scale starts anew
            self.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"], self.context.env.rank)
