"""``model.sync_batchnorm`` with ``distributed.reduction=exact``: all virtual shards compute in lockstep.

A BatchNorm over the global batch needs the inputs of all shards before one of them can continue, and so does its
backward pass. Each shard of a rank therefore runs in its own thread, but only one thread at a time, in the order of the
shards: until it needs a sum over all shards. When all of them wait for it, one all-reduce makes the sum.

Each shard writes its own row, so each element of the all-reduce has only one term that is not 0. Each rank then adds
all rows in the same order. So the sum does not depend on the number of ranks.

A row begins with a number for the layer, and all rows have the length of the widest layer: ranks at different layers
find that out, instead of waiting for each other.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distlenet.reduction.buffers import BufferAverage
from distlenet.reduction.exact import ExactReducer, ExactStep
from distlenet.reduction.reducer import ExampleLoss, MicroBatch, T
from distlenet.task import Data
from distlenet.utils.errors import UserError
from distlenet.utils.keyed_random import default_generator
from distlenet.utils.nested import count_samples

FIX = "each forward pass must call the same BatchNorm layers in the same order; or give model.sync_batchnorm=false"

END, FAILED = 1.0, -1.0
"""Numbers in rows of shards that have ended, and of a rank whose shards are at different layers."""

_thread = threading.local()  # its ``shard`` is the shard that the thread computes


class _Cancelled(BaseException):
    """Ends the thread of a shard, after an exception elsewhere."""


class _Term(NamedTuple):
    """What a shard adds to a sum over all shards."""

    layer: nn.Module
    backward: bool
    values: Tensor  # float64 (n,)


class _Shard(Generic[T]):
    """A function in a thread that runs only during ``advance``.

    Other shards run in between. So each shard has its own buffers of the model and its own state of the generator.
    """

    def __init__(
        self, row: int | None, function: Callable[[], T], buffers: BufferAverage, device: torch.device
    ) -> None:
        """Start a thread for shard ``row``; None adds nothing to the sums."""
        self.row, self.function, self.buffers, self.copies = row, function, buffers, buffers.copies()
        self.generator = default_generator(device)
        self.random_state = self.generator.get_state()
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.turns: SimpleQueue[Tensor | None] = SimpleQueue()  # the sum that the thread waits for; None ends it
        self.pauses: SimpleQueue[_Term | None] = SimpleQueue()  # None: the thread has ended
        self.term: _Term | None = None
        self.totals: list[Tensor] = []  # of the forward pass
        self.result: T | None = None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def advance(self, total: Tensor) -> None:
        """Let the thread continue with ``total`` until it has another ``term``, or None at its end."""
        # All threads share the cache of weights in bf16: what it holds must not depend on the other shards of the rank.
        torch.clear_autocast_cache()
        self.generator.set_state(self.random_state)
        with self.buffers.exchanged(self.copies):
            self.turns.put(total)
            self.term = self.pauses.get()
        self.random_state = self.generator.get_state()
        if self.error is not None:
            raise self.error

    def add(self, layer: nn.Module, backward: bool, values: Tensor) -> Tensor:
        """Return, in the thread, the sum of ``values``, float64 (n,), over all shards. A collective.

        ``backward`` distinguishes the two sums of ``layer``.
        """
        self.pauses.put(_Term(layer, backward, values))
        if (total := self.turns.get()) is None:
            raise _Cancelled
        return total

    def end(self) -> None:
        """End the thread."""
        self.turns.put(None)
        self.thread.join()

    def _run(self) -> None:
        _thread.shard = self
        stream = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        try:
            # Otherwise all shards would share one thread for the backward pass on a GPU.
            with torch.autograd.set_multithreading_enabled(False), stream:
                if self.turns.get() is not None:
                    self.result = self.function()
        except BaseException as error:  # raised by ``advance``
            self.error = error
        self.pauses.put(None)


def this_shard() -> _Shard[Any] | None:
    """Return the shard that this thread computes; None in the main thread."""
    return getattr(_thread, "shard", None)


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *totals: Tensor) -> Tensor:
        ctx.totals = len(totals)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.totals  # None counts as 0


def connect(loss: Tensor) -> Tensor:
    """Return ``loss`` so that its backward pass includes each sum of the forward pass, in reverse order.

    Otherwise it would leave out a layer on which the loss of this shard does not depend, and the others would wait.
    Autograd computes the newest operation first, among those that are connected with the loss.
    """
    shard = this_shard()
    return loss if shard is None else cast(Tensor, _Connect.apply(loss, *shard.totals))


class LockstepReducer(ExactReducer):
    """``ExactReducer`` of a model with ``GlobalBatchNorm``."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of ``ExactReducer``."""
        super().__init__(model, *args, **kwargs)
        self.device = self.sum.device
        self.names = {module: name for name, module in model.named_modules()}
        self.numbers = {module: number for number, module in enumerate(self.names, start=1)}
        widest = max((module.num_features for module in self.names if isinstance(module, _BatchNorm)), default=0)
        self.row_length = 2 + 2 * widest  # a number, two sums per feature, and the count
        self.example_loss: ExampleLoss | None = None
        self.mismatch = torch.zeros((), dtype=torch.bool, device=self.device)

    def warm_up(self, example_loss: ExampleLoss) -> None:
        """Keep what a rank without samples computes."""
        self.example_loss = example_loss

    def map(self, function: Callable[[MicroBatch], T], micro_batches: list[MicroBatch]) -> list[T]:
        """Call ``function`` on the micro-batches of all ranks in lockstep. A collective; at the end, a host sync.

        Raise UserError if their forward passes call different layers.
        """
        parts = [(micro_batch.number, partial(function, micro_batch)) for micro_batch in micro_batches]
        shards = [_Shard(row, part, self.buffers, self.device) for row, part in parts]
        idle = [] if shards else [_Shard(None, self._compute_example, self.buffers, self.device)]
        self._run([*shards, *idle])
        return [cast(T, shard.result) for shard in shards]

    def _run(self, shards: list[_Shard[Any]]) -> None:
        total, problem = torch.zeros(0), ""
        self.mismatch.zero_()
        try:
            while True:
                for shard in shards:
                    shard.advance(total.clone())
                terms = [shard.term for shard in shards]
                problem = self._difference(terms)
                if problem or terms[0] is None:
                    break
                total = self._sum(shards, 2.0 * self.numbers[terms[0].layer] + terms[0].backward)
        finally:
            for shard in shards:
                shard.end()
        self._end(shards, problem)

    def _sum(self, shards: list[_Shard[Any]], number: float) -> Tensor:
        """Return the sum of the terms of all shards of all ranks. A collective; no host sync."""
        numbers, values = self._exchange(shards, number)
        self.mismatch |= ((numbers != number) & (numbers != 0)).any()
        return values.sum(0)

    def _exchange(self, shards: list[_Shard[Any]], number: float) -> tuple[Tensor, Tensor]:
        """Return the numbers of all shards, 0 if there is none, and their values, of no more columns than needed."""
        rows = torch.zeros(self.virtual_shards, self.row_length, dtype=torch.float64, device=self.device)
        length = 0
        for shard in shards:
            rows[self.env.rank if shard.row is None else shard.row, 0] = number
            if shard.term is not None:
                length = len(shard.term.values)
                if shard.row is not None:
                    rows[shard.row, 1 : 1 + length] = shard.term.values
        self.all_reduce(rows)  # collective
        return rows[:, 0], rows[:, 1 : 1 + length]

    def _end(self, shards: list[_Shard[Any]], problem: str) -> None:
        """Wait until the shards of all ranks have ended. A collective, then a host sync.

        Raise UserError, on all ranks, if shards were at different layers.
        """
        for shard in shards:
            shard.term = None
        while True:  # more than once only if another rank is at a layer
            numbers, _ = self._exchange(shards, FAILED if problem else END)
            self.mismatch |= ((numbers != END) & (numbers != 0)).any()
            if not bool(self.mismatch):  # host sync
                return
            if bool((numbers <= END).all()):
                break
        raise UserError(f"model.sync_batchnorm=true: {problem or 'ranks are at different BatchNorm layers'}: {FIX}")

    def _difference(self, terms: list[_Term | None]) -> str:
        """Return where the shards of this rank are, if they wait for different sums."""
        places = [
            "the end" if term is None else f"{self.names[term.layer]} ({'backward' if term.backward else 'forward'})"
            for term in terms
        ]
        other = next((place for place in places if place != places[0]), None)
        return "" if other is None else f"a shard is at {places[0]}, another one at {other}"

    def _compute_example(self) -> None:
        """Take part in the sums of a step in which this rank has no samples: compute an example, and discard it."""
        assert self.example_loss is not None, "no warm_up before this step"
        torch.autograd.grad(connect(self.example_loss(self.model)), self.parameters, allow_unused=True)

    def make_step(self, global_size: int, time_in_graph: bool) -> ExactStep:
        """Return the object of one step."""
        return _LockstepStep(self, global_size, time_in_graph)


class _LockstepStep(ExactStep):
    def map(self, function: Callable[[MicroBatch], T], data: Data) -> list[T]:
        def compute(micro_batch: MicroBatch) -> T:
            result = function(micro_batch)
            self.reducer.buffers.add(micro_batch.number, count_samples(micro_batch.data))
            return result

        return self.reducer.map(compute, self.reducer.split(data))

    def differentiate(self, loss_sum: Tensor, factor: Tensor) -> None:
        parameters = self.reducer.parameters  # their ``grad`` is shared by all shards
        gradients = torch.autograd.grad(connect(loss_sum), parameters, factor, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.add_shard()
