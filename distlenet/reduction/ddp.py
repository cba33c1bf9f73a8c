"""DistributedDataParallel's reduction, with one number more in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo  # see below
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.preemption import StopFlag
from distlenet.reduction.micro_batching import Marks, MicroBatch
from distlenet.reduction.shared_memory import AllReduce

# DistributedDataParallel imports torch._dynamo when it is first built, and an exception kept from that import
# (seen with torch 2.15) keeps every frame under way alive, with the trainer and the process group in them.
# Imported up here, it finds no such frames: the group can end when its ``with`` block does.


OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True}
"""Chosen by measurement: ``benchmarks/reduction_cost.py`` also tries smaller buckets and ``static_graph``."""


Hook = Callable[[Any, dist.GradBucket], Future[Tensor]]  # type: ignore[name-defined]


def add_with(all_reduce: AllReduce) -> Hook:
    """Have DistributedDataParallel add a bucket of gradients over ranks with ``all_reduce``, and not average it."""

    def hook(_: Any, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        gradients = bucket.buffer()
        all_reduce(gradients)
        done: Future[Tensor] = Future()
        done.set_result(gradients)
        return done

    return hook


class _WithFlag(nn.Module):
    """A network, beside it a parameter that is always 0 and that nothing uses: only its gradient is meant."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.net = net
        self.flag = nn.Parameter(torch.zeros((), device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.net(inputs)
        return logits


class DdpReducer:
    """DistributedDataParallel: floats, added over ranks in whatever order ``all_reduce`` does."""

    def __init__(
        self,
        net: nn.Module,
        env: DistributedEnvironment,
        accumulation_steps: int,
        micro_batch: int,
        all_reduce: AllReduce = dist.all_reduce,
        compress: bool = False,
    ) -> None:
        """Wrap ``net``; a rank's share is cut into ``accumulation_steps`` parts of up to ``micro_batch`` images.

        With ``compress`` gradients travel as bf16, through the process group.
        """
        self.net = net
        device = next(net.parameters()).device
        with_flag = _WithFlag(net, device)
        self.flag = with_flag.flag
        self.asked, self.answer = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.heard = StopFlag(device)
        self.hook: Hook | None = None
        self.weight = env.world_size  # DistributedDataParallel divides by it, and so does its hook
        if compress:
            self.hook = bf16_compress_hook
        elif all_reduce is not dist.all_reduce:
            self.hook, self.weight = add_with(all_reduce), 1
        self.model = self.wrap(with_flag)
        self.marks = Marks()
        marks = self.marks  # not self: a hook's references are hidden from the collector, and the group would never go
        next(net.parameters()).register_post_accumulate_grad_hook(lambda _: marks.ready())  # the first is the last
        self.rank, self.micro_batch_size, self.micro_batches_per_rank = env.rank, micro_batch, accumulation_steps

    def wrap(self, with_flag: nn.Module) -> DistributedDataParallel:
        """Have the gradients of ``with_flag`` averaged. A collective."""
        model = DistributedDataParallel(with_flag, **OPTIONS)
        if self.hook is not None:
            model.register_comm_hook(None, self.hook)
        return model

    def settle(self, empty: Tensor) -> None:
        """Step once on no images, an ``empty`` batch (0, ...), and throw the gradients away. A collective.

        After its first backward DistributedDataParallel orders its buckets anew. With three ranks or more the place
        in a bucket decides in which order floats are added; so a run that goes on must have the order that one
        without a stop has by then.
        """
        self.net.eval()
        for _ in range(2):  # the new order comes with the second forward
            self.backward(self.model(empty).sum())
        self.net.train()
        self.model.zero_grad(set_to_none=True)

    def micro_batches(self, *tensors: Tensor) -> list[MicroBatch]:
        """Cut a rank's share (n, ...) into neighbours; an empty share is one empty micro-batch."""
        parts = zip(*(tensor.split(self.micro_batch_size) for tensor in tensors), strict=True)
        return list(enumerate(parts, start=self.rank * self.micro_batches_per_rank))

    def limit_micro_batch(self, images: int) -> None:
        """Take no micro-batch of more than ``images``, with more of them: fewer ranks need no more memory each."""
        share = self.micro_batch_size * self.micro_batches_per_rank
        if images < self.micro_batch_size:
            self.micro_batch_size, self.micro_batches_per_rank = images, -(-share // images)

    def begin(self, asked: bool) -> None:
        """Begin a step; ``asked`` says that this rank was asked to stop."""
        self.asked.fill_(asked)

    def begin_again(self, empty: Tensor) -> None:
        """Forget a step that broke off anywhere; ``empty`` is as for ``settle``. A collective.

        DistributedDataParallel would wait for the rest of that step's gradients: so it is made anew.
        """
        with_flag = self.model.module
        del self.model  # takes its hooks from the parameters
        self.model = self.wrap(with_flag)
        self.settle(empty)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of one micro-batch. With the last one, a collective."""
        with nullcontext() if last else self.model.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; one that is not finite turns the flag's into NaN, for all ranks."""
        (loss + self.flag * (self.asked + loss.detach() * 0)).backward()

    def finish(self) -> None:
        """Keep what all ranks said: the last backward has reduced."""
        self.marks.reduced()
        assert self.flag.grad is not None
        self.answer.copy_(self.flag.grad)
        torch.ne(self.answer, self.answer, out=self.bad)  # NaN is not itself
        self.flag.grad = None

    def hear(self) -> None:
        """Look, at the end of a step, whether any rank was asked to stop."""
        self.heard.put(self.answer)
