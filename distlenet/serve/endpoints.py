"""What each path answers."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from distlenet import __version__
from distlenet.images.image_format import ImageFormat
from distlenet.serve.batching import Batcher
from distlenet.serve.image_upload import Options, answer, decode_image, image_file
from distlenet.serve.instances import fit, read_tensorflow_inputs
from distlenet.serve.messages import (
    SMALL,
    ClientDisconnected,
    HttpError,
    Request,
    Response,
    json_response,
    overloaded,
)
from distlenet.serve.request_metrics import RequestMetrics
from distlenet.serve.served_model import ServedModel, TensorSpec
from distlenet.serve.v2_protocol import model_metadata, parse_json, read_request, write_response
from distlenet.serve.versions import Versions

DECODERS = 1  # threads that decode images: one may need 0.8 GB for an image of 50 million pixels

T = TypeVar("T")


@dataclass(frozen=True)
class Endpoint:
    """A function that answers requests. ``is_public``: also without the token."""

    name: str
    handler: Callable[[Request], Awaitable[Response]]
    is_public: bool = False


class Endpoints:
    """The handlers, which share the model's versions and the batcher."""

    def __init__(self, name: str, versions: Versions, batcher: Batcher, metrics: RequestMetrics) -> None:
        self.name, self.versions, self.batcher, self.metrics = name, versions, batcher, metrics
        self.is_draining = False
        self._decoders = ThreadPoolExecutor(DECODERS, "image")
        self._turn = asyncio.Semaphore(DECODERS)
        self._decoding = 0
        self._reader = ThreadPoolExecutor(1, "reader")  # one large body at a time: parsed, it needs much memory

    def table(self) -> dict[str, dict[str, Endpoint]]:
        """Return {path: {method: endpoint}}. A path of a model may also have ``/versions/N`` behind its name."""
        v1, v2 = f"/v1/models/{self.name}", f"/v2/models/{self.name}"
        return {
            f"{v1}:predict": {"POST": Endpoint("v1_predict", self.v1_predict)},
            f"{v2}/infer": {"POST": Endpoint("v2_infer", self.v2_infer)},
            "/predict": {"POST": Endpoint("predict", self.predict)},
            v1: {"GET": Endpoint("v1_status", self.v1_status)},
            f"{v1}/metadata": {"GET": Endpoint("v1_metadata", self.v1_metadata)},
            "/v2": {"GET": Endpoint("v2_server", self.v2_server)},
            "/v2/health/live": {"GET": Endpoint("health", self.live, True)},
            "/v2/health/ready": {"GET": Endpoint("health", self.ready, True)},
            v2: {"GET": Endpoint("v2_metadata", self.v2_metadata)},
            f"{v2}/ready": {"GET": Endpoint("health", self.model_ready, True)},
            "/healthz": {"GET": Endpoint("health", self.live, True)},
            "/readyz": {"GET": Endpoint("health", self.ready, True)},
            "/metrics": {"GET": Endpoint("metrics", self.show_metrics)},
        }

    def start_draining(self) -> None:
        """From now on, report that this server is not ready."""
        self.is_draining = True

    async def v1_predict(self, request: Request) -> Response:
        """Answer TensorFlow Serving's predict request."""
        model = self.versions.get(request.version)
        inputs, key = await self._read(request, read_v1, request, model)
        outputs = await self.batcher.predict(model, inputs)
        return json_response({key: outputs["predictions"]})

    async def v2_infer(self, request: Request) -> Response:
        """Answer an inference request of KServe v2."""
        model = self.versions.get(request.version)
        inputs, content = await self._read(request, read_request, request, model)
        return write_response(content, await self.batcher.predict(model, inputs), model, self.name)

    async def predict(self, request: Request) -> Response:
        """Classify an image file."""
        model = self.versions.newest()
        if model.images is None:
            raise HttpError(400, f"this model reads no image files; POST JSON to /v1/models/{self.name}:predict")
        name, spec = next(iter(model.inputs.items()))
        options = Options.from_query(request.query, model.outputs["predictions"].shape[-1] or 1)
        content = await self._read(request, image_file, request)
        if self._decoding >= self.batcher.max_queue:
            raise overloaded(f"{self._decoding} images are waiting; send this request again later")
        self._decoding += 1
        try:
            image = await self._decode(request, content, options, model.images)
        finally:
            self._decoding -= 1
        array = fit(name, spec, image[None].astype(spec.dtype), model)
        outputs = await self.batcher.predict(model, {name: array})
        return json_response(answer(outputs, image, options, model))

    async def _decode(self, request: Request, content: bytes, options: Options, images: ImageFormat) -> np.ndarray:
        """Decode an image in a thread. If the client disconnects before its turn, raise ClientDisconnected instead."""
        assert request.receive is not None
        disconnect = asyncio.ensure_future(request.receive())
        try:
            async with self._turn:
                if disconnect.done():
                    raise ClientDisconnected
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._decoders, decode_image, content, options, images)
        finally:
            disconnect.cancel()

    async def _read(self, request: Request, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function reads from a body: in a thread if it is large, so that others are answered."""
        if len(request.body) <= SMALL:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._reader, _read_large, function, *arguments)

    async def v1_status(self, request: Request) -> Response:
        """Answer with the states of the versions, as TensorFlow Serving does."""
        available = ("AVAILABLE", "OK", "")
        if request.version is not None:
            states = {self.versions.get(request.version).version: available}
        else:
            states = dict.fromkeys(self.versions.loaded, available)
            states |= {version: ("END", "DATA_LOSS", text) for version, text in self.versions.failures.items()}
        entries = [
            {"version": str(version), "state": state, "status": {"error_code": code, "error_message": text}}
            for version, (state, code, text) in sorted(states.items(), reverse=True)
        ]
        return json_response({"model_version_status": entries})

    async def v1_metadata(self, request: Request) -> Response:
        """Answer with inputs and outputs as TensorFlow Serving does, and with the class names."""
        model = self.versions.get(request.version)

        def tensors(specs: dict[str, TensorSpec]) -> dict[str, Any]:
            return {
                name: {
                    "dtype": f"DT_{spec.dtype.name.upper().replace('FLOAT32', 'FLOAT').replace('FLOAT64', 'DOUBLE')}",
                    "tensor_shape": {
                        "dim": [{"size": str(-1 if dim is None else dim), "name": ""} for dim in spec.shape],
                        "unknown_rank": False,
                    },
                    "name": name,
                }
                for name, spec in specs.items()
            }

        signature = {
            "inputs": tensors(model.inputs),
            "outputs": tensors({"predictions": model.outputs["predictions"]}),
            "method_name": "tensorflow/serving/predict",
        }
        specification = {"name": self.name, "signature_name": "", "version": str(model.version)}
        definition = {"signature_def": {"signature_def": {"serving_default": signature}}}
        more = {key: model.metadata.get(key) for key in ("classes", "checkpoint", "task")}
        return json_response({"model_spec": specification, "metadata": definition, "distlenet": more})

    async def v2_server(self, _: Request) -> Response:
        """Answer with the name of the server and its extensions."""
        return json_response({"name": "distlenet", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def v2_metadata(self, request: Request) -> Response:
        """Answer with the inputs and outputs of the model."""
        model = self.versions.get(request.version)
        return json_response(model_metadata(model, list(self.versions.loaded), self.name))

    async def live(self, _: Request) -> Response:
        """Answer that the process runs."""
        return Response(b'{"live":true}')

    async def ready(self, _: Request) -> Response:
        """Answer whether the server takes requests: not while it drains."""
        is_ready = bool(self.versions.loaded) and not self.is_draining
        return json_response({"ready": is_ready}, 200 if is_ready else 503)

    async def model_ready(self, request: Request) -> Response:
        """Answer whether a version takes requests."""
        self.versions.get(request.version)
        return await self.ready(request)

    async def show_metrics(self, _: Request) -> Response:
        """Answer with the metrics."""
        return self.metrics.response()


def read_v1(request: Request, model: ServedModel) -> tuple[dict[str, np.ndarray], str]:
    """Return the inputs of a request of TensorFlow Serving, and the key of the answer. Raise HttpError."""
    body = parse_json(request.body)
    return read_tensorflow_inputs(body, model), "outputs" if "inputs" in body else "predictions"


def _read_large(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function without garbage collections, which would traverse millions of values many times.

    Its error has no traceback, which would hold these values until the event loop frees them.
    """
    gc.disable()
    try:
        return function(*arguments)
    except HttpError as error:
        raise error.with_traceback(None) from None
    finally:
        gc.enable()
