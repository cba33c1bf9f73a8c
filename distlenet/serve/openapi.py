"""The description of the HTTP interface, in the OpenAPI format."""

from typing import Any

from distlenet import __version__
from distlenet.serve.served_model import ServedModel, TensorSpec

JSON_TYPES = {"b": "boolean", "i": "integer", "u": "integer", "f": "number"}
ERRORS = {"400": "The request is invalid.", "413": "The body is too large.", "503": "Too many requests; try again."}


def describe(name: str, model: ServedModel, needs_token: bool) -> dict[str, Any]:
    """Return the document for a model."""
    v1, v2 = f"/v1/models/{name}", f"/v2/models/{name}"
    sample = {key: _tensor(spec, 1) for key, spec in model.inputs.items()}
    batch = {key: _tensor(spec, 0) for key, spec in model.inputs.items()}
    if len(sample) == 1:
        row, column = next(iter(sample.values())), next(iter(batch.values()))
    else:
        row, column = ({"type": "object", "properties": part, "required": list(part)} for part in (sample, batch))
    rows = {"type": "object", "properties": {"instances": {"type": "array", "items": row}, "inputs": column}}
    answer = {"type": "object", "properties": {"predictions": _tensor(model.outputs["predictions"], 0)}}
    v2_body = {"type": "object", "properties": {"inputs": {"type": "array", "items": {"type": "object"}}}}
    image = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"image": image}}
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "integer"}}
    query = [
        {"name": "top", "in": "query", "description": "classes to return", "schema": {"type": "integer"}},
        {"name": "invert", "in": "query", "schema": {"type": "string", "enum": ["auto", "yes", "no"]}},
        {"name": "seen", "in": "query", "description": "1: also return the image as the network sees it", "schema": {}},
    ]
    predict = _operation("Predict, as TensorFlow Serving", {"application/json": rows}, answer)
    infer = _operation("Predict, as KServe v2; also with binary tensors", {"application/json": v2_body})
    paths: dict[str, Any] = {
        f"{v1}:predict": {"post": predict},
        f"{v1}/versions/{{version}}:predict": {"parameters": [version], "post": predict},
        v1: {"get": _operation("State of the versions")},
        f"{v1}/metadata": {"get": _operation("Inputs, outputs and class names")},
        f"{v2}/infer": {"post": infer},
        f"{v2}/versions/{{version}}/infer": {"parameters": [version], "post": infer},
        v2: {"get": _operation("Inputs and outputs, as KServe v2")},
        f"{v2}/ready": {"get": _operation("Whether the model takes requests")},
        "/v2": {"get": _operation("Name and version of the server")},
        "/v2/health/live": {"get": _operation("Whether the process runs")},
        "/v2/health/ready": {"get": _operation("Whether the server takes requests")},
        "/healthz": {"get": _operation("Whether the process runs")},
        "/readyz": {"get": _operation("Whether the server takes requests")},
        "/metrics": {"get": _operation("Metrics for Prometheus")},
    }
    if model.images is not None:
        kinds = {"image/png": image, "image/jpeg": image, "multipart/form-data": form}
        paths["/predict"] = {"post": {**_operation("Classify an image file", kinds), "parameters": query}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"distlenet: {name}", "version": __version__},
        "paths": paths,
    }
    if needs_token:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        document["security"] = [{"token": []}]
    return document


def _operation(
    summary: str, body: dict[str, Any] | None = None, answer: dict[str, Any] | None = None
) -> dict[str, Any]:
    content = {"application/json": {"schema": answer or {}}}
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "OK", "content": content}}}
    if body:
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": s} for kind, s in body.items()}}
        operation["responses"] |= {status: {"description": text} for status, text in ERRORS.items()}
    return operation


def _tensor(spec: TensorSpec, start: int) -> dict[str, Any]:
    """Return the schema of nested lists for the dimensions from ``start`` on."""
    schema: dict[str, Any] = {"type": JSON_TYPES.get(spec.dtype.kind, "number")}
    if spec.dtype.name == "uint8":
        schema |= {"minimum": 0, "maximum": 255}
    for dim in reversed(spec.shape[start:]):
        limits = {} if dim is None else {"minItems": dim, "maxItems": dim}
        schema = {"type": "array", "items": schema, **limits}
    return schema
