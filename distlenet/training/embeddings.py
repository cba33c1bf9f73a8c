"""The vectors of samples before the last layer of a network, for the projector of TensorBoard."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distlenet.distributed.context import DistributedContext
from distlenet.task import Batch
from distlenet.training.outline import TaskOutline
from distlenet.training.thumbnails import find_images
from distlenet.utils.eval_mode import eval_mode

MAX_SAMPLES = 1000
MIN_DIMENSIONS = 3  # of a vector: TensorBoard draws three


@dataclass
class Embeddings:
    """The vectors of n samples, and what is known of these."""

    vectors: list[Tensor] = field(default_factory=list)  # float32 (d,) each, on the host
    labels: list[Any] = field(default_factory=list)  # empty, or one per sample
    predictions: list[int] = field(default_factory=list)  # empty, or the class with the largest output of each sample
    images: list[Tensor] = field(default_factory=list)  # empty, or one per sample


@torch.no_grad()
def embed(
    outline: TaskOutline, model: nn.Module, batches: Iterable[Batch], context: DistributedContext, limit: int
) -> Embeddings | None:
    """Return the vectors of the first ``limit`` samples; None if the network has none of at least MIN_DIMENSIONS.

    A vector is the input of the linear layer that returns the network's outputs, or else these outputs. Host syncs.
    """
    result = Embeddings()
    with eval_mode(model):
        for batch in batches:
            data, count = batch.inputs(outline.task), min(len(batch), limit - len(result.vectors))
            with _last_layer(model) as layer, context.autocast():
                outputs = outline.loss(model, data).outputs
            vectors = layer.vectors(outputs, len(batch))
            if vectors is None or vectors.shape[1] < MIN_DIMENSIONS:
                return None
            result.vectors += vectors[:count].float().cpu()  # host sync
            result.labels += _labels(data, len(batch))[:count]
            if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1:
                result.predictions += outputs.argmax(1)[:count].tolist()  # host sync
            result.images += [image.cpu() for image in find_images(batch.data, count)]
            if len(result.vectors) == limit:
                break
    return result


class _LastLayer:
    """The input and the output of the linear layer that ran last, and the output of the whole network."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.linear: Tensor | None = None
        self.network: Any = None

    def vectors(self, outputs: Any, count: int) -> Tensor | None:
        """Return vectors (n, d) of ``count`` samples, on the device; None if there are none."""
        network = self.network if isinstance(self.network, Tensor) else outputs
        found = network
        if self.linear is not None and self.inputs is not None and isinstance(network, Tensor):
            same = self.linear.untyped_storage().data_ptr() == network.untyped_storage().data_ptr()
            found = self.inputs if same else network  # the same memory: nothing but views follows the layer
        if not isinstance(found, Tensor) or found.dim() == 0 or len(found) != count or not found.is_floating_point():
            return None
        return found.flatten(1) if found.dim() > 1 else found.unsqueeze(1)


@contextmanager
def _last_layer(model: nn.Module) -> Iterator[_LastLayer]:
    last = _LastLayer()

    def after_linear(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        last.inputs, last.linear = args[0], output

    def after_network(_: nn.Module, __: Any, output: Any) -> None:
        last.network = output

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.callback(module.register_forward_hook(after_linear).remove)
        hooks.callback(model.register_forward_hook(after_network).remove)
        yield last


def _labels(data: Any, count: int) -> list[Any]:
    """Return the targets if the data is a pair of inputs and one integer per sample. A host sync."""
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        targets = data[1]
        if targets.shape == (count,) and not targets.is_floating_point():
            return [int(value) for value in targets.tolist()]
    return []
