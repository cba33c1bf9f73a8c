"""Operators on CUDA tensors, computed on the CPU on the same memory.

The fake runtime launches kernels that compute nothing. This mode sees each operator, also in backward and in
DistributedDataParallel, and runs it twice: first as usual, which allocates the outputs, launches and waits; then on CPU
tensors that share the memory. In a capture, the second run is kept for the launches of the graph.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fake_cuda import random_numbers, runtime, substitutes
from fake_cuda.host_memory import flat, host, host_value

RUNS, CAPTURED, STUCK = range(3)  # what becomes of work on a stream; see fake_enter
LOW_PRECISION = (torch.float16, torch.bfloat16)
NOTHING_TO_COMPUTE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"),
    *("resize_", "set_", "record_stream", "_pin_memory", "is_pinned", "is_set_to", "_unsafe_view", "lift_fresh"),
}
IN_FLOAT32 = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}  # as the GPU accumulates


@dataclass
class Plan:
    """How to compute an operator."""

    nothing: bool  # a view, or an allocation
    new_outputs: list[bool]  # by return value: whether it is a new tensor, not an argument
    random: bool
    dynamic_shape: bool
    in_float32: bool

    def new(self, returned: Any) -> list[Tensor]:
        """Return the new tensors in what the operator returned."""
        values = (returned,) if len(self.new_outputs) == 1 else returned or ()
        return flat([value for value, is_new in zip(values, self.new_outputs, strict=True) if is_new])


@cache
def plan_of(func: Any) -> Plan:
    """Return the plan, from the operator's schema."""
    name, returns = func._schema.name.partition("::")[2], func._schema.returns
    aliases = [value.alias_info for value in returns]
    return Plan(
        nothing=name in NOTHING_TO_COMPUTE or any(alias is not None and not alias.is_write for alias in aliases),
        new_outputs=[alias is None for alias in aliases],
        random=torch.Tag.nondeterministic_seeded in func.tags,
        dynamic_shape=torch.Tag.dynamic_output_shape in func.tags,
        in_float32=name in IN_FLOAT32,
    )


@dataclass
class Recording:
    """The operators of a capture, in order."""

    work: list[Callable[[], object]] = field(default_factory=list)
    offsets: random_numbers.Offsets = field(default_factory=random_numbers.Offsets)


class ComputeOnHost(TorchDispatchMode):
    """The mode; one for all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.recordings: dict[int, Recording] = {}
        self.callback = runtime.Callback(self._replay)
        self.error: BaseException | None = None
        runtime.set_callback(self.callback)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = device_of(args, kwargs)
        if device is None or func.namespace == "c10d":  # the runtime's collectives compute
            return func(*args, **kwargs)
        plan = plan_of(func)
        if plan.nothing:
            return func(*args, **kwargs)
        stream = torch._C._cuda_getCurrentRawStream(device)
        generator = random_numbers.generator_of(device, kwargs) if plan.random else None
        state = runtime.enter(stream)
        try:
            before = random_numbers.position(generator) if generator is not None and state == RUNS else None
            out = func(*args, **kwargs)
        finally:
            runtime.quiet(0)
        if generator is not None and before is not None:
            random_numbers.learn(func, args, generator, before)
        if state == STUCK:
            return out
        work = self._work(func, plan, args, kwargs, out)
        if state == CAPTURED:
            self._record(stream, work, func, args, generator)
            return out
        with random_numbers.seeded(before):
            value = work()
        return out if isinstance(out, Tensor | list | tuple) or out is None else value

    def _work(self, func: Any, plan: Plan, args: Any, kwargs: Any, out: Any) -> Callable[[], Any]:
        """Return the computation of the operator on the host's view of its arguments and outputs."""
        function = substitutes.on_host(func)
        host_args, host_kwargs = host_value(args), {key: host_value(value) for key, value in kwargs.items()}
        if "generator" in host_kwargs:
            host_kwargs["generator"] = None
        new = plan.new(out) if plan.dynamic_shape else []  # a recording must keep no tensor of the device alive
        targets = [] if plan.dynamic_shape else [host(tensor) for tensor in plan.new(out)]

        def work() -> Any:
            value = run_in_precision(function, plan, host_args, host_kwargs)
            results = plan.new(value)
            if plan.dynamic_shape:  # known only now
                for tensor, result in zip(new, results, strict=True):
                    tensor.resize_(result.shape)
                    host(tensor).copy_(result)
            else:
                for target, result in zip(targets, results, strict=True):
                    if target.numel() and result.numel():  # one side may have no use for a saved value
                        target.copy_(result)
            return value

        return work

    def _record(self, stream: int, work: Callable[[], Any], func: Any, args: Any, generator: Any) -> None:
        for ended in runtime.forgotten():
            self.recordings.pop(ended, None)
        recording = self.recordings.setdefault(runtime.capture_id(stream), Recording())
        if generator is not None:
            work = recording.offsets.at_replay(work, func, args, generator)
        runtime.record(stream, len(recording.work))
        recording.work.append(work)

    def _replay(self, capture: int, index: int) -> int:
        """Compute an operator of a graph. Called by the runtime, without this mode."""
        try:
            with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
                self.recordings[capture].work[index]()
        except BaseException as error:
            import traceback

            traceback.print_exception(error)
            return 1
        return 0


def device_of(args: Any, kwargs: Any) -> int | None:
    """Return the index of the GPU on which an operator runs, or None."""
    for tensor in flat(args):
        if tensor.is_cuda:
            return tensor.get_device()
    for value in kwargs.values():
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.cuda.current_device() if value.index is None else value.index
        if isinstance(value, Tensor) and value.is_cuda:
            return value.get_device()
    return None


def run_in_precision(function: Any, plan: Plan, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU; in float32 if the CPU cannot in the arguments' lower precision."""
    if not plan.in_float32:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            plan.in_float32 = True
    low = [tensor for tensor in flat((args, list(kwargs.values()))) if tensor.dtype in LOW_PRECISION]
    if not low:
        return function(*args, **kwargs)
    high = {id(tensor): tensor.float() for tensor in low}

    def raised(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(raised(part) for part in value)
        return high.get(id(value), value) if isinstance(value, Tensor) else value

    before = {key: tensor._version for key, tensor in high.items()}
    value = function(*raised(args), **{key: raised(part) for key, part in kwargs.items()})
    for tensor in low:
        if high[id(tensor)]._version != before[id(tensor)]:  # an argument that the operator changes
            tensor.copy_(high[id(tensor)])
    return value


MODE = ComputeOnHost()


def install() -> None:
    """Enter the mode in this thread, and in threads that it starts later, until the process ends."""
    substitutes.register()
    MODE.__enter__()
    os.register_at_fork(after_in_child=leave)  # a loader's process has no CUDA
    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:
        with MODE:
            run(thread)

    threading.Thread.run = run_in_mode  # type: ignore[method-assign]
    # With a mode, autograd adds gradients out of place, which loses the strides of a weight with one input channel.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    text_of = torch._tensor_str._str  # leaves all modes
    torch._tensor_str._str = lambda tensor, **options: text_of(host(tensor), **options)


def leave() -> None:
    """Leave all modes of this thread."""
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)


@contextmanager
def paused() -> Iterator[None]:
    """Compute nothing in the block, neither eagerly nor in replays: to measure the time of the host."""
    runtime.execute(0)
    try:
        with torch._C._DisableTorchDispatch():
            yield
    finally:
        runtime.execute(1)
