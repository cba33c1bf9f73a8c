"""The operations of one forward pass, as a graph: modules are scopes, tensors are edges."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distlenet.utils.nested import tensors_in

Node = dict[str, Any]
"""A node of the graph: ``name`` (scopes separated by slashes), ``op``, ``inputs`` (names of nodes; output 1 of a node
is ``name:1``) and ``shapes`` (of its outputs)."""


def trace_network(model: nn.Module, forward: Callable[[], object]) -> list[Node]:
    """Return the nodes of what ``model`` computes when ``forward`` calls it. No host sync.

    Only operations inside modules are recorded. The tensors of ``forward`` that they take are inputs.
    """
    recorder = _Recorder(model)
    with recorder.following(model), recorder:
        forward()
    return recorder.nodes


class _Recorder(TorchFunctionMode):
    """Records functions of torch, as a module calls them: ``relu`` and ``linear``, not the kernels below."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.root = type(model).__name__
        self.nodes: list[Node] = []
        self.scopes: list[str] = []  # of the modules that run now, innermost last
        self.counts: Counter[str] = Counter()
        self.sources: dict[int, str] = {}  # the output that a tensor is, by its id
        self.kept: list[Tensor] = []  # an id stays that of one tensor only while this lives
        named = [*model.named_parameters(), *model.named_buffers()]
        self.parameters = {id(tensor): (name, tensor) for name, tensor in named}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch and record it, unless it returns no tensor, as ``Tensor.shape``."""
        outputs = func(*args, **(kwargs or {}))
        if self.scopes and any(True for _ in tensors_in(outputs)):
            self._add(_name_of(func), list(tensors_in((args, kwargs or {}))), list(tensors_in(outputs)))
        return outputs

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follow which module runs, by hooks that are removed at the end."""
        with ExitStack() as hooks:
            for path, module in model.named_modules():
                scope = self._scope(path)
                before = module.register_forward_pre_hook(lambda *_, scope=scope: self.scopes.append(scope))
                after = module.register_forward_hook(self._leave)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def _scope(self, path: str) -> str:
        return "/".join([self.root, *filter(None, path.split("."))])

    def _leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        """Record a module as one node if its operations were not seen: that of a scripted module, for example."""
        tensors = list(tensors_in(outputs))
        if any(id(tensor) not in self.sources for tensor in tensors):
            self._add(type(module).__name__, list(tensors_in(args)), tensors)
        self.scopes.pop()
        if not self.scopes:
            for tensor in tensors:
                self._append("output", "Output", [self.sources[id(tensor)]], [tensor])

    def _add(self, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = self._append(f"{self.scopes[-1]}/{op}", op, [self._source(tensor) for tensor in inputs], outputs)
        for number, tensor in enumerate(outputs):
            self.sources[id(tensor)] = f"{name}:{number}" if number else name

    def _append(self, name: str, op: str, inputs: list[str], outputs: list[Tensor]) -> str:
        count = self.counts[name]
        self.counts[name] += 1
        name = f"{name}_{count}" if count else name
        shapes = [list(tensor.shape) for tensor in outputs]
        self.nodes.append({"name": name, "op": op, "inputs": inputs, "shapes": shapes})
        self.kept += outputs
        return name

    def _source(self, tensor: Tensor) -> str:
        """Return the output that a tensor is; a tensor from elsewhere becomes a node: a parameter or an input."""
        if id(tensor) not in self.sources:
            path, _ = self.parameters.get(id(tensor), (None, None))
            if path is None:
                self.sources[id(tensor)] = self._append("input", "Input", [], [tensor])
            else:
                self.sources[id(tensor)] = self._append(self._scope(path), "Parameter", [], [tensor])
        return self.sources[id(tensor)]


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":  # of an attribute such as Tensor.T
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_") or name
