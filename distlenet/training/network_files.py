"""What TensorBoard shows of the network, in addition to the records: files in ``RUN/tensorboard``.

``graph.json`` and ``inputs.png`` are written before the first step; ``distlenet.tracking.tensorboard`` puts them into
the event file. The files of the projector are written after the last step, and TensorBoard reads them itself.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from distlenet.config.schema import Config
from distlenet.data.loader import EvaluationLoader, Loader
from distlenet.distributed.context import DistributedContext
from distlenet.task import Datasets
from distlenet.tracking.base import NETWORK_GRAPH_FILE, NETWORK_INPUTS_FILE
from distlenet.training.device_step import DeviceStep
from distlenet.training.embeddings import MAX_SAMPLES, Embeddings, embed
from distlenet.training.network_graph import trace_network
from distlenet.training.thumbnails import find_images, make_sheet, make_thumbnails
from distlenet.utils.errors import warn
from distlenet.utils.eval_mode import eval_mode
from distlenet.utils.files import replace_text

SHOWN_INPUTS, COLUMNS = 64, 8
INPUT_PIXELS = 128  # of the longest side of a training image, at most
SPRITE_PIXELS = 48  # the same of a test image: TensorBoard accepts 8192 for all
PROJECTOR_FILE = "projector_config.pbtxt"


class NetworkFiles:
    """Writes the files on rank 0, with ``tracking.tensorboard``; otherwise the methods do nothing."""

    def __init__(
        self, config: Config, context: DistributedContext, on_device: DeviceStep, datasets: Datasets, run_dir: Path
    ) -> None:
        self.enabled = config.tracking.tensorboard and context.env.rank == 0
        self.config, self.context, self.on_device = config, context, on_device
        self.datasets = datasets if self.enabled else None
        self.directory = run_dir / "tensorboard"

    @torch.no_grad()
    def write_inputs(self, loader: Loader) -> None:
        """Write the graph of the network, and the first training images as the network receives them. Host syncs."""
        if not self.enabled:
            return
        parts = self.on_device
        with self._warnings("the graph and the inputs of the network"):
            self.directory.mkdir(exist_ok=True)
            with eval_mode(parts.model), parts.autocast:
                nodes = trace_network(parts.model, lambda: parts.outline.loss(parts.model, parts.example))
            replace_text(self.directory / NETWORK_GRAPH_FILE, json.dumps(nodes), durable=False)
            images = find_images(loader.batch(0, 0).inputs(parts.task), SHOWN_INPUTS)
            if images:
                thumbnails = make_thumbnails(images, INPUT_PIXELS, enlarge=True)
                cell = max(max(thumbnail.size) for thumbnail in thumbnails)
                make_sheet(thumbnails, COLUMNS, cell, gap=2).save(self.directory / NETWORK_INPUTS_FILE)

    def write_embeddings(self) -> None:
        """Write the vectors of the first test samples. Host syncs."""
        if (datasets := self.datasets) is None:
            return
        parts, task = self.on_device, self.on_device.task
        with self._warnings("the vectors of the test samples"):
            loader = EvaluationLoader(
                datasets.test, task.eval_batch_size, 0, 1, self.context.device, task.collate, self.config.seed
            )
            embeddings = embed(parts.outline, parts.evaluated_model(), loader, self.context, MAX_SAMPLES)
            if embeddings is not None:
                write_projector(self.directory, embeddings, datasets.classes or ())

    @contextmanager
    def _warnings(self, what: str) -> Iterator[None]:
        """Warn about an error: a training does not fail because of what is shown of it."""
        try:
            yield
        except Exception as error:  # any: the code is the user's
            warn(f"TensorBoard: {what} cannot be written: {type(error).__name__}: {str(error)[:300]}")


def write_projector(directory: Path, embeddings: Embeddings, classes: Sequence[str]) -> None:
    """Write vectors, their labels and images, and the file that names these. Raise OSError."""
    count, lines = len(embeddings.vectors), ['tensor_name: "test samples"', 'tensor_path: "vectors.tsv"']
    vectors = ("\t".join(f"{value:.6g}" for value in vector.tolist()) for vector in embeddings.vectors)
    replace_text(directory / "vectors.tsv", "\n".join(vectors) + "\n", durable=False)
    columns = {}
    for name, values in (("label", embeddings.labels), ("prediction", embeddings.predictions)):
        if len(values) == count:
            columns[name] = [_class_name(value, classes) for value in values]
    columns["index"] = [str(index) for index in range(count)]
    header = [list(columns)] if len(columns) > 1 else []  # TensorBoard expects none for a single column
    rows = [*header, *zip(*columns.values(), strict=True)]
    replace_text(directory / "metadata.tsv", "".join("\t".join(row) + "\n" for row in rows), durable=False)
    lines.append('metadata_path: "metadata.tsv"')
    if len(embeddings.images) == count:
        thumbnails = make_thumbnails(embeddings.images, SPRITE_PIXELS)
        cell = max(max(thumbnail.size) for thumbnail in thumbnails)
        make_sheet(thumbnails, math.ceil(math.sqrt(count)), cell).save(directory / "sprite.png")
        lines.append(f'sprite {{ image_path: "sprite.png" single_image_dim: [{cell}, {cell}] }}')
    text = "embeddings {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    replace_text(directory / PROJECTOR_FILE, text, durable=False)


def _class_name(value: int, classes: Sequence[str]) -> str:
    return " ".join(classes[value].split()) if 0 <= value < len(classes) else str(value)
