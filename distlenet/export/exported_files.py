"""Write the files that hold a network, one for each format."""

from pathlib import Path

import torch

from distlenet.export.export_formats import NETWORK_FORMATS
from distlenet.export.exported_network import (
    OUTPUTS,
    TRANSFORMED,
    ExportedNetwork,
    Inputs,
    NetworkOnly,
    TransformOnly,
)
from distlenet.export.graph import trace, write_onnx, write_pt2
from distlenet.export.reference import Reference
from distlenet.export.trained_source import TrainedSource
from distlenet.export.weight_file import write_weights
from distlenet.tasks.image_classification import ImageClassification


def write_networks(
    directory: Path,
    source: TrainedSource,
    network: ExportedNetwork,
    formats: set[str],
    reference: Reference,
    split: bool,
    header: str,
) -> dict[str, list[Path]]:
    """Write the files of all formats; return the files of each network that is compared."""
    networks = {}
    if "safetensors" in formats:
        file = directory / NETWORK_FORMATS["safetensors"]
        write_weights(source.trained.model, file, {"distlenet": header})
        networks[file.name] = [file]
    graphs: dict[str, tuple[torch.nn.Module, Inputs, dict[str, set[int]], tuple[str, ...]]] = {
        "model": (network, reference.example, reference.dynamic(), OUTPUTS)
    }
    if split:
        task = source.trained.task
        assert isinstance(task, ImageClassification)
        transform = TransformOnly(task).eval()
        with torch.no_grad():
            transformed = transform(**reference.example)
        graphs["transform"] = (transform, reference.example, reference.dynamic(), (TRANSFORMED,))
        graphs["network"] = (
            NetworkOnly(source.trained.model, task).eval(),
            transformed,
            {TRANSFORMED: {0}},
            OUTPUTS,
        )
    suffixes = [suffix for suffix in ("pt2", "onnx") if suffix in formats]  # torch.onnx may change the graph: the last
    for name, (module, example, dynamic, outputs) in graphs.items():
        program = trace(module, example, dynamic) if suffixes else None
        for suffix in suffixes:
            file = directory / f"{name}.{suffix}"
            assert program is not None
            if suffix == "pt2":
                write_pt2(program, file, header)
            else:
                write_onnx(program, file, header, outputs)
            if name != "transform":
                networks[file.name] = [file] if name == "model" else [directory / f"transform.{suffix}", file]
    return networks
