"""Nested lists of JSON as arrays of the types and shapes of a network."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from distlenet.serve.messages import HttpError
from distlenet.serve.served_model import ServedModel, TensorSpec

MAX_EXTRA_DIMENSIONS = 2  # deeper lists are refused before they are read
ALLOWED: dict[str, set[type]] = {
    "b": {bool},
    "i": {int},
    "u": {int},
    "f": {int, float},
}  # kind of a NumPy type: types of JSON values


def read_tensorflow_inputs(body: Any, model: ServedModel) -> dict[str, np.ndarray]:
    """Return the inputs of a request of TensorFlow Serving: ``instances``, one per sample, or ``inputs``.

    Raise HttpError if they do not fit the model.
    """
    if not isinstance(body, dict) or ("instances" in body) == ("inputs" in body):
        raise HttpError(400, 'expected a JSON object with "instances" (one value per sample) or "inputs"')
    if body.get("signature_name") not in (None, "", "serving_default"):
        raise HttpError(400, f'signature_name {str(body["signature_name"])[:100]!r}: expected "serving_default"')
    if "inputs" in body:
        value = body["inputs"]
        tensors = value if isinstance(value, dict) else {_only_input(model): value}
    else:
        rows = body["instances"]
        if not isinstance(rows, list) or not rows:
            raise HttpError(400, '"instances": expected a list with at least one sample')
        if isinstance(rows[0], dict):
            if any(type(row) is not dict or row.keys() != rows[0].keys() for row in rows):
                raise HttpError(400, '"instances": expected objects with the same keys')
            tensors = {name: [row[name] for row in rows] for name in rows[0]}
        else:
            tensors = {_only_input(model): rows}
    return check_inputs({name: (_spec(model, name), value) for name, value in tensors.items()}, model)


def check_inputs(tensors: Mapping[str, tuple[TensorSpec, Any]], model: ServedModel) -> dict[str, np.ndarray]:
    """Return the tensors as arrays in the order of the model's inputs; values are arrays or nested lists."""
    if missing := model.inputs.keys() - tensors.keys():
        raise HttpError(400, f"input {min(missing)} is missing; expected {', '.join(model.inputs)}")
    arrays = {name: fit(name, *tensors[name], model) for name in model.inputs}
    counts = {name: len(array) for name, array in arrays.items()}
    if len({*counts.values()}) > 1:
        raise HttpError(400, f"the inputs have different numbers of samples: {counts}")
    return arrays


def _only_input(model: ServedModel) -> str:
    if len(model.inputs) > 1:
        raise HttpError(400, f"expected an object with the inputs {', '.join(model.inputs)}")
    return next(iter(model.inputs))


def _spec(model: ServedModel, name: Any) -> TensorSpec:
    if name not in model.inputs:
        raise HttpError(400, f"input {str(name)[:100]!r} is unknown; expected {', '.join(model.inputs)}")
    return model.inputs[name]


def to_array(name: str, spec: TensorSpec, value: Any) -> np.ndarray:
    """Return nested lists as an array of the type of ``spec``. Raise HttpError if a value or a length is wrong."""
    shape: list[int] = []
    level = [value]
    while type(level[0]) is list:
        if len(shape) == len(spec.shape) + MAX_EXTRA_DIMENSIONS:
            raise HttpError(400, f"{name}: the lists are too deep; expected shape {shape_text(spec)}")
        if {*map(type, level)} != {list} or len(lengths := {*map(len, level)}) > 1 or lengths == {0}:
            raise HttpError(400, f"{name}: has lists of different lengths, or empty ones; expected {shape_text(spec)}")
        shape += lengths
        level = list(chain.from_iterable(level))
    try:
        if spec.dtype == np.uint8:  # bytes() checks types and limits, four times as fast as NumPy
            return np.frombuffer(bytes(level), np.uint8).reshape(shape)
        if {*map(type, level)} <= ALLOWED.get(spec.dtype.kind, set()):
            return _in_range(np.array(level), spec.dtype).reshape(shape)
    except (TypeError, ValueError, OverflowError):
        pass
    raise HttpError(400, f"{name}: {expected_values(spec)}")


def _in_range(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if array.dtype.kind not in "iu" or array.min() < limits.min or array.max() > limits.max:
            raise ValueError
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def expected_values(spec: TensorSpec) -> str:
    """Return the sentence of an error message about a wrong value."""
    if spec.dtype == np.uint8:
        return "expected integers from 0 to 255; pixels are not scaled to 0..1"
    return f"expected values of type {spec.dtype}"


def shape_text(spec: TensorSpec) -> str:
    """Return a shape as messages write it; N is the number of samples."""
    return f"[{', '.join(['N', *('?' if dim is None else str(dim) for dim in spec.shape[1:])])}]"


def fit(name: str, spec: TensorSpec, value: Any, model: ServedModel) -> np.ndarray:
    """Return an array, or nested lists, as an array of the shape of ``spec``. Raise HttpError if it has another one.

    Images may also be (H, W, 1), (1, H, W) or (H, W, C).
    """
    array = value if isinstance(value, np.ndarray) else to_array(name, spec, value)
    if array.ndim and array.size and _fits(array.shape, spec):
        return array
    if array.size and model.images is not None:
        for other in _layouts(array):
            if _fits(other.shape, spec):
                return other
    raise HttpError(400, f"{name}: has shape {list(array.shape)}, expected {shape_text(spec)}")


def _layouts(array: np.ndarray) -> list[np.ndarray]:
    """Return a batch of images with its channels removed, added or first."""
    if array.ndim == 3:
        return [array[:, None]]
    if array.ndim != 4:
        return []
    found = [np.ascontiguousarray(array.transpose(0, 3, 1, 2))]
    return found + [array.reshape(shape) for axis in (1, 3) if (shape := _without(array.shape, axis))]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    return (*shape[:axis], *shape[axis + 1 :]) if shape[axis] == 1 else None


def _fits(shape: tuple[int, ...], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(b in (None, a) for a, b in zip(shape, spec.shape, strict=True))
