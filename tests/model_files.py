"""Small exported models, written without PyTorch."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = [f"class {number}" for number in range(10)]
GREY = {"channels": 1, "size": [28, 28], "resized": False, "mean": [0.3], "std": [0.3], "low": 0.0, "high": 255.0}
IMAGES = {**GREY, "dark_border": True}
TYPES = {"uint8": TensorProto.UINT8, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}


def write_version(directory: Path, number: int = 1, *, seed: int = 0, images: dict | None = IMAGES) -> Path:
    """Write a linear classifier of 28 × 28 images; another ``seed`` gives other weights."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((784, 10)).astype(np.float32) / 28
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["flat"]),
        helper.make_node("Div", ["flat", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "weights"], ["outputs"]),
        helper.make_node("Softmax", ["outputs"], ["predictions"]),
    ]
    constants = {"scale": np.float32(255), "weights": weights}
    inputs = {"images": ("uint8", [None, 28, 28])}
    outputs = {name: ("float32", [None, 10]) for name in ("outputs", "predictions")}
    return write_model(directory, number, nodes, constants, inputs, outputs, classes=CLASSES, images=images)


def write_text_version(directory: Path, number: int = 1) -> Path:
    """Write a model with two inputs of any length: the mean of the embeddings of the words, times a factor."""
    nodes = [
        helper.make_node("Gather", ["table", "words"], ["vectors"]),
        helper.make_node("ReduceMean", ["vectors", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "factor"], ["outputs"]),
        helper.make_node("Sigmoid", ["outputs"], ["predictions"]),
    ]
    constants = {"table": np.arange(10, dtype=np.float32).reshape(10, 1), "axes": np.array([1])}
    inputs = {"words": ("int64", [None, None]), "factor": ("float32", [None, 1])}
    outputs = {name: ("float32", [None, 1]) for name in ("outputs", "predictions")}
    return write_model(directory, number, nodes, constants, inputs, outputs)


def write_model(directory, number, nodes, constants, inputs, outputs, classes=None, images=None, name="fashion"):
    path = directory / str(number)
    path.mkdir(parents=True)

    def values(specs):
        return [
            helper.make_tensor_value_info(key, TYPES[kind], [dim or f"dim{i}" for i, dim in enumerate(shape)])
            for key, (kind, shape) in specs.items()
        ]

    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    (path / "model.onnx").write_bytes(content)
    description = {
        "format": 1,
        "name": name,
        "inputs": {key: {"dtype": kind, "shape": shape} for key, (kind, shape) in inputs.items()},
        "outputs": {key: {"dtype": kind, "shape": shape} for key, (kind, shape) in outputs.items()},
        "classes": classes,
        "images": images,
        "files": {"model.onnx": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }
    (path / "model.json").write_text(json.dumps(description))
    return path
