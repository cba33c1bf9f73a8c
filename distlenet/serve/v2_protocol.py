"""The Open Inference Protocol (KServe v2) with its binary extension: requests, answers, and model metadata."""

import math
from typing import Any

import numpy as np
import orjson

from distlenet.serve.instances import allowed_shapes, check_inputs, expected_values, fits, shape_text, to_array
from distlenet.serve.messages import SMALL, HttpError, Request, Response, json_response
from distlenet.serve.served_model import ServedModel, TensorSpec

DATATYPES = {
    **{
        f"{prefix}{bits}": f"{kind}{bits}"
        for prefix, kind in (("INT", "int"), ("UINT", "uint"))
        for bits in (8, 16, 32, 64)
    },
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BOOL": "bool",
}
NAMES = {name: datatype for datatype, name in DATATYPES.items()}
MAX_LISTS = 2**20  # and objects of a body: nothing else runs while orjson parses it
LENGTH_HEADER = b"inference-header-content-length"


def read_request(request: Request, model: ServedModel) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the inputs, and the JSON part of the request. Raise HttpError if they do not fit the model."""
    text, data = request.body, memoryview(b"")
    if length := request.header(LENGTH_HEADER):
        if not length.isdigit() or len(length) > 18 or int(length) > len(request.body):
            raise HttpError(400, "Inference-Header-Content-Length: expected the length of the JSON part of the body")
        text, data = request.body[: int(length)], memoryview(request.body)[int(length) :]
    content = parse_json(text)
    if not isinstance(content, dict) or not isinstance(content.get("inputs"), list):
        raise HttpError(400, 'expected a JSON object with "inputs", a list of tensors')
    _check_outputs(content, model)
    tensors: dict[str, np.ndarray] = {}
    for tensor in content["inputs"]:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str) or name not in model.inputs or name in tensors:
            raise HttpError(400, f"inputs: expected one tensor for each of {', '.join(model.inputs)}, by name")
        tensors[name], data = _read_tensor(name, tensor, model, data)
    if len(data):
        raise HttpError(400, f"the body has {len(data)} bytes more than the tensors")
    return check_inputs(tensors, model), content


def _check_outputs(content: dict[str, Any], model: ServedModel) -> None:
    """Raise HttpError unless ``outputs`` is missing or a list of different outputs of the model."""
    wanted = content.get("outputs") or []
    valid = isinstance(wanted, list) and len(wanted) <= len(model.outputs)
    names: list[Any] = [part.get("name") if isinstance(part, dict) else None for part in wanted] if valid else [None]
    if any(not isinstance(name, str) or name not in model.outputs or names.count(name) > 1 for name in names):
        raise HttpError(400, f"outputs: expected different names of {', '.join(model.outputs)}")


def parse_json(text: bytes) -> Any:
    """Parse the JSON of a body. Raise HttpError."""
    if len(text) > SMALL and text.count(b"[") + text.count(b"{") > MAX_LISTS:
        raise HttpError(400, f"the JSON has more than {MAX_LISTS:,} lists; send fewer samples, or binary tensors")
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise HttpError(400, f"the body is not valid JSON: {str(error)[:200]}") from error


def _read_tensor(
    name: str, tensor: dict[str, Any], model: ServedModel, data: memoryview
) -> tuple[np.ndarray, memoryview]:
    """Return a tensor, and the rest of the binary data."""
    spec = model.inputs[name]
    if tensor.get("datatype") != NAMES.get(spec.dtype.name):
        raise HttpError(400, f"{name}: expected datatype {NAMES.get(spec.dtype.name)}")
    shape = tensor.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(dim) is int and 0 < dim < 2**40 for dim in shape):
        raise HttpError(400, f"{name}: shape: expected a list of positive integers")
    if not any(fits(shape, expected) for expected in allowed_shapes(spec, model)):
        raise HttpError(400, f"{name}: has shape {str(shape)[:100]}, expected {shape_text(spec)}")
    count = math.prod(shape)
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        array = to_array(name, TensorSpec(spec.dtype, tuple(shape)), tensor.get("data"), [(count,), tuple(shape)])
        return array.reshape(shape), data
    if type(size) is not int or size != count * spec.dtype.itemsize or size > len(data):
        raise HttpError(400, f"{name}: binary_data_size {str(size)[:20]} does not fit its shape, type and the body")
    raw = np.frombuffer(data[:size], np.uint8 if spec.dtype == bool else spec.dtype.newbyteorder("<"))
    if spec.dtype == bool and raw.max() > 1:
        raise HttpError(400, f"{name}: {expected_values(spec)}")
    return raw.astype(spec.dtype, copy=False).reshape(shape), data[size:]


def write_response(
    content: dict[str, Any], outputs: dict[str, np.ndarray], model: ServedModel, model_name: str
) -> Response:
    """Return the answer to a request, whose JSON part is ``content``: the outputs that it names, or all."""
    wanted: list[dict[str, Any]] = content.get("outputs") or [{"name": name} for name in outputs]
    binary = _flag(content, "binary_data_output")
    described, data = [], []
    for part in wanted:
        name = part["name"]
        array = np.ascontiguousarray(outputs[name])
        tensor: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype.name], "shape": list(array.shape)}
        if _flag(part, "binary_data", binary):
            data.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
            tensor["parameters"] = {"binary_data_size": len(data[-1])}
        else:
            tensor["data"] = (array.astype(np.float32) if array.dtype == np.float16 else array).ravel()
        described.append(tensor)
    head: dict[str, Any] = {"model_name": model_name, "model_version": str(model.version), "outputs": described}
    if isinstance(content.get("id"), str):
        head["id"] = content["id"]
    answer = json_response(head)
    if not data:
        return answer
    length = ((LENGTH_HEADER, str(len(answer.body)).encode()),)
    return Response(answer.body + b"".join(data), 200, b"application/octet-stream", length)


def _flag(part: Any, name: str, default: bool = False) -> bool:
    parameters = part.get("parameters")
    return bool(parameters.get(name, default)) if isinstance(parameters, dict) else default


def model_metadata(model: ServedModel, versions: list[int], model_name: str) -> dict[str, Any]:
    """Return what ``GET /v2/models/NAME`` answers."""

    def tensors(specs: dict[str, TensorSpec]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "datatype": NAMES.get(spec.dtype.name),
                "shape": [-1 if d is None else d for d in spec.shape],
            }
            for name, spec in specs.items()
        ]

    return {
        "name": model_name,
        "versions": [str(version) for version in sorted(versions)],
        "platform": "onnxruntime_onnx",
        "inputs": tensors(model.inputs),
        "outputs": tensors(model.outputs),
    }
