"""Nested lists of JSON as arrays of the types and shapes of a network."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from distlenet.serve.messages import HttpError
from distlenet.serve.served_model import ServedModel, TensorSpec

Shape = tuple[int | None, ...]
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
            _check_names(rows[0], model)
            if any(type(row) is not dict or row.keys() != rows[0].keys() for row in rows):
                raise HttpError(400, '"instances": expected objects with the same keys')
            tensors = {name: [row[name] for row in rows] for name in rows[0]}
        else:
            tensors = {_only_input(model): rows}
    return check_inputs(tensors, model)


def check_inputs(tensors: Mapping[str, Any], model: ServedModel) -> dict[str, np.ndarray]:
    """Return the tensors as arrays in the order of the model's inputs; values are arrays or nested lists."""
    _check_names(tensors, model)
    arrays = {name: fit(name, spec, tensors[name], model) for name, spec in model.inputs.items()}
    counts = {name: len(array) for name, array in arrays.items()}
    if len({*counts.values()}) > 1:
        raise HttpError(400, f"the inputs have different numbers of samples: {counts}")
    return arrays


def _only_input(model: ServedModel) -> str:
    if len(model.inputs) > 1:
        raise HttpError(400, f"expected an object with the inputs {', '.join(model.inputs)}")
    return next(iter(model.inputs))


def _check_names(tensors: Mapping[str, Any], model: ServedModel) -> None:
    """Raise HttpError unless there is one value for each input."""
    for name in tensors:
        if name not in model.inputs:
            raise HttpError(400, f"input {str(name)[:100]!r} is unknown; expected {', '.join(model.inputs)}")
    if missing := model.inputs.keys() - tensors.keys():
        raise HttpError(400, f"input {min(missing)} is missing; expected {', '.join(model.inputs)}")


def allowed_shapes(spec: TensorSpec, model: ServedModel) -> list[Shape]:
    """Return the shapes of an input in a request; images may also be (H, W, 1), (1, H, W) or (H, W, C)."""
    shapes = [spec.shape]
    if model.images is not None and len(spec.shape) == 3:
        rows, height, width = spec.shape
        shapes += [(rows, 1, height, width), (rows, height, width, 1)]
    elif model.images is not None and len(spec.shape) == 4:
        rows, channels, height, width = spec.shape
        shapes += [(rows, height, width, channels)]
        if channels in (1, None):
            shapes += [(rows, height, width)]
    return shapes


def to_array(name: str, spec: TensorSpec, value: Any, shapes: Sequence[Shape]) -> np.ndarray:
    """Return nested lists, which have one of ``shapes``, as an array of the type of ``spec``. Raise HttpError.

    The first sample is checked before the others are read: a large body of another shape costs little.
    """
    shape: list[int] = []
    first, rank = value, max(map(len, shapes))
    while type(first) is list:
        if len(shape) == rank:
            raise HttpError(400, f"{name}: the lists are too deep; expected shape {shape_text(spec)}")
        shape.append(len(first))
        first = first[0] if first else None
    if 0 in shape:
        raise HttpError(400, f"{name}: has empty lists; expected {shape_text(spec)}")
    if not any(fits(shape, expected) for expected in shapes):
        raise HttpError(400, f"{name}: has shape {shape}, expected {shape_text(spec)}")
    level = value
    for length in shape[1:]:
        if {*map(type, level)} != {list} or {*map(len, level)} != {length}:
            raise HttpError(400, f"{name}: has lists of different lengths; expected {shape_text(spec)}")
        level = list(chain.from_iterable(level))
    try:
        if spec.dtype == np.uint8:  # bytes() checks types and limits, and is faster than NumPy
            pixels = bytes(level)
            if b"e" in orjson.dumps(level):  # true or false, which bytes() takes for 1 and 0
                raise TypeError
            return np.frombuffer(pixels, np.uint8).reshape(shape)
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
    """Return an array, or nested lists, as an array of the shape of ``spec``.

    Raise HttpError if it does not have one of the allowed shapes, or if a value is not finite.
    """
    array = value if isinstance(value, np.ndarray) else to_array(name, spec, value, allowed_shapes(spec, model))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise HttpError(400, f"{name}: has values that are not finite, or too large for {spec.dtype}")
    if array.size and fits(array.shape, spec.shape):
        return array
    if array.size and model.images is not None:
        for other in _layouts(array):
            if fits(other.shape, spec.shape):
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


def fits(shape: Sequence[int], expected: Shape) -> bool:
    """Return whether a shape is the expected one, whose None is any length."""
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))
