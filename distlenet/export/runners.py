"""Load an exported file, as a program in production does. For ONNX, neither PyTorch nor the task is needed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

Runner = Callable[[Mapping[str, np.ndarray]], Arrays]
"""Computes the outputs by name of a batch of inputs by name."""


def load_runner(files: Sequence[Path], network: Mapping[str, Any]) -> Runner:
    """Load the files of a network; each but the first takes the single output of the one before it.

    ``network`` names the checkpoint, which a file of weights needs: ``path``, ``overrides`` and ``files`` of settings.
    """
    parts = [LOADERS[file.suffix](file, network) for file in files]

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        results = dict(inputs)
        for part in parts:
            results = part(results)
        return results

    return run


def _load_onnx(file: Path, network: Mapping[str, Any]) -> Runner:  # noqa: ARG001
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _load_pt2(file: Path, network: Mapping[str, Any]) -> Runner:  # noqa: ARG001
    import torch

    return _runner_of(torch.export.load(file).module())


def _load_weights(file: Path, network: Mapping[str, Any]) -> Runner:
    from safetensors import safe_open

    from distlenet.checkpoint.format import load_checkpoint
    from distlenet.export.exported_network import ExportedNetwork
    from distlenet.export.weight_file import tied_names
    from distlenet.inference.trained_model import restore_model

    checkpoint = Path(network["path"])
    with safe_open(file, framework="pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        weights |= {name: weights[same] for name, same in tied_names(opened.metadata()).items()}
    state = {**load_checkpoint(checkpoint), "model": weights}
    trained = restore_model(state, checkpoint, None, network["overrides"], network["files"])
    return _runner_of(ExportedNetwork(trained.model, trained.task).eval())


def _runner_of(module: Any) -> Runner:
    import torch

    def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
        with torch.no_grad():
            outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    return run


LOADERS: dict[str, Callable[[Path, Mapping[str, Any]], Runner]] = {
    ".onnx": _load_onnx,
    ".pt2": _load_pt2,
    ".safetensors": _load_weights,
}
