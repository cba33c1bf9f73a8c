"""One version of an exported model, verified and loaded by ONNX Runtime."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from distlenet.images.image_format import ImageFormat
from distlenet.utils.errors import one_line
from distlenet.utils.exported_model import INT8, MODEL_FORMAT

Arrays = Mapping[str, np.ndarray]
ONNX_TYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names that differ from NumPy's


class BadVersion(Exception):
    """A version cannot be served; the text contains the reason."""


class CannotCompute(Exception):
    """The network raises an error for these inputs; the text contains the reason."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ``shape`` has None for dimensions that vary; dimension 0 is the sample."""

    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class ServedModel:
    """A session of ONNX Runtime with the content of ``model.json``. ``run`` may be called in any thread."""

    def __init__(self, directory: Path, version: int, file: str, threads: int) -> None:
        """Load ``file`` of a version's directory. Raise BadVersion if it is damaged or does not fit ``model.json``."""
        self.version, self.file = version, file
        try:
            self.metadata = json.loads((directory / "model.json").read_text())
            if (found := self.metadata["format"]) != MODEL_FORMAT:
                raise BadVersion(f"model.json: format {found!r}, expected {MODEL_FORMAT}; export again")
            if file not in self.metadata["files"]:
                raise BadVersion(f"has no {file}; export it with {'--quantize int8' if file == INT8 else '--to onnx'}")
            content = (directory / file).read_bytes()
            if hashlib.sha256(content).hexdigest() != self.metadata["files"][file]["sha256"]:
                raise BadVersion(f"{file}: its SHA-256 is not the one in model.json; copy or export it again")
            self.name = str(self.metadata["name"])
            self.inputs, self.outputs = (_specs(self.metadata[part]) for part in ("inputs", "outputs"))
            self.classes = self.metadata["classes"]
            if "predictions" not in self.outputs:
                raise BadVersion("model.json: has no output predictions")
            shape = self.outputs["predictions"].shape
            _check_classes(self.classes, shape[-1])
            images = self.metadata["images"]
            is_classifier = len(self.inputs) == 1 and len(shape) == 2 and shape[1] is not None
            self.images = ImageFormat.from_dict(images) if images and is_classifier else None
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores also serve HTTP
            options.log_severity_level = 4  # errors are exceptions; they need no second line
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self._check_session()
            self._warm_up()
        except BadVersion:
            raise
        except CannotCompute as error:
            raise BadVersion(f"{file}: the network does not run on zeros: {error}") from error
        except Exception as error:  # damaged files cause many; those of ONNX Runtime have no common class
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            raise BadVersion(one_line(reason)) from error

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return all outputs of a batch. Raise CannotCompute if the network cannot compute them."""
        try:
            outputs = dict(zip(self.outputs, self.session.run(list(self.outputs), dict(inputs)), strict=True))
        except Exception as error:  # those of ONNX Runtime have no common class
            raise CannotCompute(one_line(error)) from error
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CannotCompute(f"the output {name} is not finite")
        return outputs

    def _check_session(self) -> None:
        for part, specs, found in (
            ("input", self.inputs, self.session.get_inputs()),
            ("output", self.outputs, self.session.get_outputs()),
        ):
            nodes = {node.name: node for node in found}
            if nodes.keys() != specs.keys():
                raise BadVersion(f"{self.file}: has the {part}s {sorted(nodes)}, model.json has {sorted(specs)}")
            for name, spec in specs.items():
                kind = nodes[name].type.removeprefix("tensor(").removesuffix(")")
                dims = tuple(dim if isinstance(dim, int) else None for dim in nodes[name].shape)
                same = len(dims) == len(spec.shape) and all(
                    d in (None, s) for d, s in zip(dims, spec.shape, strict=True)
                )
                if ONNX_TYPES.get(kind, kind) != spec.dtype.name or not same:
                    raise BadVersion(f"{self.file}: {part} {name} is {kind} {dims}, model.json has {spec}")

    def _warm_up(self) -> None:
        """Run one sample of zeros, if all dimensions of a sample are fixed, and check the outputs."""
        shapes = {name: [dim for dim in spec.shape[1:] if dim is not None] for name, spec in self.inputs.items()}
        if any(len(shapes[name]) + 1 < len(spec.shape) for name, spec in self.inputs.items()):
            return
        zeros = {name: np.zeros((1, *shapes[name]), spec.dtype) for name, spec in self.inputs.items()}
        for name, array in self.run(zeros).items():
            shape = self.outputs[name].shape
            if len(array) != 1 or array.ndim != len(shape):
                raise BadVersion(f"{self.file}: output {name} of one sample has shape {list(array.shape)}")


def _check_classes(classes: Any, count: int | None) -> None:
    """Raise BadVersion unless ``classes`` is None or contains a name for each of ``count`` predictions."""
    if classes is None:
        return
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise BadVersion("model.json: classes: expected null or a list of strings")
    if count not in (None, len(classes)):
        raise BadVersion(f"model.json: has {len(classes)} classes, but the output predictions has {count}")


def _specs(part: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorSpec]:
    specs = {name: TensorSpec(np.dtype(spec["dtype"]), tuple(spec["shape"])) for name, spec in part.items()}
    for name, spec in specs.items():
        if not spec.shape or spec.shape[0] is not None or not all(d is None or type(d) is int for d in spec.shape):
            raise BadVersion(f"model.json: {name}: shape {list(spec.shape)}; dimension 0 must be null, the sample")
    return specs
