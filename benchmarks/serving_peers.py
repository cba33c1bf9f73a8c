"""The servers that ``serving.py`` compares with, as their users write them: one worker, one thread for PyTorch.

``python benchmarks/serving_peers.py fastapi|litserve CHECKPOINT --port N``: both answer ``POST /predict`` with
``{"instances": [...]}`` by ``{"predictions": [...]}``. FastAPI computes each request at once, in the event loop, which
is faster here than its thread pool. LitServe forms batches of at most 64 requests and waits at most 2 ms for others.
"""

import argparse
from typing import Any

import numpy as np
import torch

from distlenet import load_model

try:
    from litserve import LitAPI
except ModuleNotFoundError:  # only needed for litserve
    LitAPI = object


def predict(model: torch.nn.Module, images: np.ndarray) -> list[list[float]]:
    """Return the probabilities of images, uint8 (n, 28, 28)."""
    with torch.inference_mode():
        return model(torch.from_numpy(images)).softmax(1).tolist()


def run_fastapi(checkpoint: str, port: int) -> None:
    """Run FastAPI on uvicorn, with uvloop and httptools."""
    import uvicorn
    from fastapi import FastAPI, Request

    model = load_model(checkpoint)
    app = FastAPI()

    @app.post("/predict")
    async def answer(request: Request) -> dict[str, Any]:
        content = await request.json()
        return {"predictions": predict(model, np.array(content["instances"], np.uint8))}

    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False)


class Api(LitAPI):  # type: ignore[misc, valid-type]
    """The network for LitServe, which sends it to its worker process."""

    def __init__(self, checkpoint: str, **options: Any) -> None:
        super().__init__(**options)
        self.checkpoint = checkpoint

    def setup(self, _: str) -> None:
        """Load the network, in the worker."""
        torch.set_num_threads(1)
        self.model = load_model(self.checkpoint)

    def decode_request(self, request: dict[str, Any], **_: Any) -> np.ndarray:
        """Return the images of a request."""
        return np.array(request["instances"], np.uint8)

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Return the images of all requests of a batch."""
        return np.concatenate(inputs)

    def predict(self, images: np.ndarray, **_: Any) -> list[list[float]]:
        """Return the probabilities of a batch."""
        return predict(self.model, images)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """Return the answer of each request."""
        return output

    def encode_response(self, output: list[float], **_: Any) -> dict[str, Any]:
        """Return the body of an answer."""
        return {"predictions": [output]}


def run_litserve(checkpoint: str, port: int) -> None:
    """Run LitServe with dynamic batches."""
    from litserve import LitServer

    api = Api(checkpoint, max_batch_size=64, batch_timeout=0.002)
    server = LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=port, host="127.0.0.1", log_level="warning", generate_client_file=False, access_log=False)


def main() -> None:
    """Run the requested server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=("fastapi", "litserve"))
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (run_fastapi if arguments.server == "fastapi" else run_litserve)(arguments.checkpoint, arguments.port)


if __name__ == "__main__":
    main()
