"""Faults of clients against ``python -m distlenet.serve``: a soak, stops under load, and a fuzz of all inputs.

``python benchmarks/serving_soak.py [--requests 10000] [--stops 10] [--fuzz-s 0]`` prints counts, and fails if a valid
request is answered wrongly or not at all, if a status is neither 2xx nor 4xx, if the server prints a traceback, or if
its memory grows. Of the requests of the soak, 1 % is malformed, too large, slow, or cut off.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from model_files import write_text_version, write_version

from distlenet.serve.served_model import ServedModel

MAX_BODY_MB = 1
GROWTH_MB = 24  # of the server's memory between a tenth of the soak and its end: allocators keep some
Counts = collections.Counter[str]
Answer = tuple[int, bytes, bool]
"""Status, body, and whether the connection stays open."""


class Server:
    """A server process whose standard error is kept."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.log = directory / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "distlenet.serve", str(model), "--port", "0"]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--max-body-mb", str(MAX_BODY_MB)], stdout=subprocess.PIPE, stderr=file, text=True
            )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def memory_mb(self) -> float:
        """Return the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> None:
        """Stop the server, and fail if it has printed an error."""
        self.process.terminate()
        self.check_end()

    def check_end(self) -> None:
        """Fail if the server does not exit, or has printed an error."""
        status = self.process.wait(60)
        lines = self.log.read_text().splitlines()
        if status or any(line.startswith(("Traceback", "Exception")) for line in lines):  # libtiff prints warnings
            sys.exit(f"the server ended with status {status}: " + "\n".join(lines[:60]))


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Read an answer. Raise IncompleteReadError if the connection ends before."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length), b"connection: close" not in head


def http(path: str, body: bytes, *headers: str) -> bytes:
    """Return a POST request."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@dataclass
class Case:
    """A request, and the check of its answer."""

    data: bytes
    check: Callable[[bytes], bool]


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def v2_request(images: np.ndarray) -> bytes:
    """Return a KServe v2 request with binary tensors."""
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": images.shape,
        "parameters": {"binary_data_size": images.size},
    }
    head = json.dumps({"inputs": [tensor], "outputs": [{"name": "predictions"}]}).encode()
    body = head + images.tobytes()
    return http("/v2/models/fashion/infer", body, f"inference-header-content-length: {len(head)}")


def make_cases(model: ServedModel) -> list[Case]:
    """Return valid requests of all forms."""
    generator = np.random.default_rng(0)
    cases = []
    for number in range(60):
        images = generator.integers(0, 256, (1 + number % 3, 28, 28), np.uint8)
        images[:, 0] = 0  # dark borders: image files are not inverted
        images[:, -1] = images[:, :, 0] = images[:, :, -1] = 0
        expected = model.run({"images": images})["predictions"]

        def rows(body: bytes, key: str = "predictions", expected: np.ndarray = expected) -> bool:
            return bool(np.allclose(np.float32(json.loads(body)[key]), expected, rtol=1e-5))

        def v2(body: bytes, expected: np.ndarray = expected) -> bool:
            data = json.loads(body)["outputs"][0]["data"]
            return bool(np.allclose(np.float32(data), expected.ravel(), rtol=1e-5))

        def top(body: bytes, expected: np.ndarray = expected) -> bool:
            return bool(json.loads(body)["top"][0]["label"] == expected[0].argmax())

        instances = json.dumps({"instances": images.tolist()}).encode()
        cases += [
            Case(http("/v1/models/fashion:predict", instances), rows),
            Case(v2_request(images), v2),
            Case(http("/predict", png(images[0])), top),
        ]
    return cases


@dataclass
class Client:
    """A connection that is opened when it is needed."""

    port: int
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = field(default=None)

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the open connection, or a new one."""
        if self.streams is None or self.streams[1].is_closing() or self.streams[0].at_eof():
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        return self.streams

    async def ask(self, data: bytes, limit_s: float = 60) -> Answer:
        """Send a request and return the answer."""
        reader, writer = await self.open()
        writer.write(data)
        answer = await asyncio.wait_for(read_answer(reader), limit_s)
        if not answer[2]:
            self.close()
        return answer

    def close(self) -> None:
        """Close the connection."""
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def misbehave(port: int, case: Case, kind: str, counts: Counts) -> None:
    """Send a bad request on a connection of its own."""
    client = Client(port)
    try:
        if kind == "malformed":
            status, *_ = await client.ask(http("/v1/models/fashion:predict", case.data[:500]))
            counts[f"malformed: {status}"] += 1
        elif kind == "oversized":
            status, *_ = await client.ask(http("/predict", bytes(2**20 + 1)))
            counts[f"oversized: {status}"] += 1
        elif kind == "cut":
            _, writer = await client.open()
            writer.write(case.data[: len(case.data) // 2])
            await writer.drain()
            counts["cut"] += 1
        else:
            reader, writer = await client.open()
            half = len(case.data) // 2
            for part in (case.data[:half], case.data[half:]):
                writer.write(part)
                await asyncio.sleep(1.0)
            status, body, _ = await asyncio.wait_for(read_answer(reader), 60)
            counts["slow: correct" if status == 200 and case.check(body) else "slow: wrong"] += 1
    finally:
        client.close()


async def soak(server: Server, cases: list[Case], total: int) -> Counts:
    """Send ``total`` requests, of which 1 % is bad; return the counts."""
    counts: Counts = collections.Counter()
    order = random.Random(0)
    remaining = total
    memory: list[float] = []

    async def worker() -> None:
        nonlocal remaining
        client = Client(server.port)
        while remaining > 0:
            remaining -= 1
            case = order.choice(cases)
            if order.random() < 0.01:
                await misbehave(server.port, case, order.choice(["malformed", "oversized", "slow", "cut"]), counts)
                continue
            status, body, _ = await client.ask(case.data)
            counts["correct" if status == 200 and case.check(body) else f"wrong: {status}"] += 1
            if remaining < 0.9 * total and not memory:
                memory.append(server.memory_mb())
        client.close()

    await asyncio.gather(*(worker() for _ in range(32)))
    memory.append(server.memory_mb())
    print(f"soak: {dict(counts)}; memory {memory[0]:.0f} MB after a tenth, {memory[-1]:.0f} MB at the end")
    if any("wrong" in key or key.endswith(("200", "500")) for key in counts) or memory[-1] > memory[0] + GROWTH_MB:
        sys.exit("the soak has failed")
    return counts


async def stop_under_load(server: Server, cases: list[Case]) -> Counts:
    """Send SIGTERM while old and new connections send requests; each request that is sent must be answered.

    A connection that the kernel refuses has sent nothing. Nor has one that the server has closed after an answer.
    """
    counts: Counts = collections.Counter()
    is_over = False

    async def worker(keeps: bool, seed: int) -> None:
        order = random.Random(seed)
        client = Client(server.port)
        while not is_over:
            case = order.choice(cases)
            try:
                await client.open()
            except (ConnectionRefusedError, ConnectionResetError):  # not accepted
                counts["refused"] += 1
                return
            try:
                status, body, _ = await client.ask(case.data)
                counts["answered" if status == 200 and case.check(body) else f"wrong: {status}"] += 1
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                counts[f"lost: {type(error).__name__}"] += 1
                client.close()
            if not keeps:
                client.close()

    workers = [asyncio.create_task(worker(number % 2 == 0, number)) for number in range(32)]
    await asyncio.sleep(1.0)
    server.process.terminate()
    await asyncio.wait(workers, timeout=30)
    is_over = True
    await asyncio.gather(*workers)
    server.check_end()
    return counts


VALUES: list[Any] = [
    None,
    True,
    -1,
    256,
    2**63,
    10**400,
    1e308,
    0.5,
    "",
    "a" * 100,
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"a": []},
]


def mutate_json(value: Any, order: random.Random, depth: int = 0) -> Any:
    """Return a value with one part replaced, removed or repeated."""
    if not isinstance(value, list | dict) or not value or order.random() < 0.15:
        return order.choice(VALUES)
    copy = list(value) if isinstance(value, list) else dict(value)
    key = order.randrange(len(copy)) if isinstance(copy, list) else order.choice(list(copy))
    change = order.random()
    if change < 0.15:
        del copy[key]
    elif change < 0.25 and isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[key] = mutate_json(copy[key], order, depth + 1)
    return copy


PIECES = [
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b"\xff\xff\xff\xff",
    b"[" * 2000,
    b"{",
    b'"',
    b"--b",
    b"%00",
    b"0",
    b"999999999999",
]


def mutate_bytes(data: bytes, order: random.Random) -> bytes:
    """Return bytes with some changes."""
    content = bytearray(data)
    for _ in range(order.choice([1, 1, 2, 4, 16])):
        place = order.randrange(len(content) + 1)
        change = order.randrange(5)
        if change == 0 and place < len(content):
            content[place] = order.randrange(256)
        elif change == 1:
            content[place:place] = order.choice(PIECES)
        elif change == 2:
            del content[place : place + order.choice([1, 4, 100])]
        elif change == 3:
            content[place:place] = content[place : place + order.choice([1, 16, 1000])]
        else:
            del content[place:]
    return bytes(content)


def fuzz_seeds() -> list[tuple[str, bytes, list[str]]]:
    """Return (path, body, headers) of valid requests."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 28, 28), np.uint8)
    color = generator.integers(0, 256, (40, 30, 3), np.uint8)
    seeds: list[tuple[str, bytes, list[str]]] = [
        ("/v1/models/fashion:predict", json.dumps({"instances": images.tolist()}).encode(), []),
        ("/v1/models/fashion:predict", json.dumps({"instances": [{"images": images[0].tolist()}]}).encode(), []),
        ("/v1/models/fashion/versions/1:predict", json.dumps({"inputs": {"images": images.tolist()}}).encode(), []),
    ]
    tensor = {"name": "images", "datatype": "UINT8", "shape": [2, 28, 28]}
    seeds.append(
        ("/v2/models/fashion/infer", json.dumps({"inputs": [{**tensor, "data": images.tolist()}]}).encode(), [])
    )
    head, _, body = v2_request(images).partition(b"\r\n\r\n")
    seeds.append(("/v2/models/fashion/infer", body, [head.decode().rpartition("\r\n")[2]]))
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        seeds.append(("/predict?seen=1&top=10", png(color, kind), []))
    seeds.append(("/predict", png(np.dstack([color, color[..., :1]])), []))
    part = b'--b\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    seeds.append(("/predict", part + png(color) + b"\r\n--b--\r\n", ["content-type: multipart/form-data; boundary=b"]))
    return seeds


def text_seeds() -> list[tuple[str, bytes, list[str]]]:
    """Return valid requests of the model with several inputs of any length."""
    rows = [{"words": [1, 2, 3], "factor": [0.5]}, {"words": [4, 5, 6], "factor": [2.0]}]
    tensors = [
        {"name": "words", "datatype": "INT64", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]},
        {"name": "factor", "datatype": "FP32", "shape": [2, 1], "data": [0.5, 2.0]},
    ]
    return [
        ("/v1/models/fashion:predict", json.dumps({"instances": rows}).encode(), []),
        ("/v2/models/fashion/infer", json.dumps({"inputs": tensors, "id": "a"}).encode(), []),
    ]


def make_request(seed: tuple[str, bytes, list[str]], order: random.Random) -> bytes:
    """Return a mutated request."""
    path, body, headers = seed
    change = order.random()
    if change < 0.4 and body.startswith(b"{"):
        with contextlib.suppress(ValueError):
            value = json.loads(body)
            for _ in range(order.choice([1, 1, 2, 3])):
                value = mutate_json(value, order)
            body = json.dumps(value).encode("utf-8", "replace")
    elif change < 0.85:
        body = mutate_bytes(body, order)
    elif change < 0.92:
        path = "".join(character for character in mutate_bytes(path.encode(), order).decode("latin-1"))
    else:
        return mutate_bytes(http(path, body, *headers), order)
    return http(path, body, *headers)


async def fuzz(server: Server, seeds: list[tuple[str, bytes, list[str]]], seconds: float) -> None:
    """Send mutated requests for a time. Fail if a status is neither 2xx nor 4xx, or the server ends."""
    counts: Counts = collections.Counter()
    start = server.memory_mb()
    deadline = time.monotonic() + seconds

    async def worker(seed: int) -> None:
        order = random.Random(seed)
        client = Client(server.port)
        while time.monotonic() < deadline:
            data = make_request(order.choice(seeds), order)
            try:
                status = (await client.ask(data, 1.0))[0]
                counts[str(status)] += 1
                if not 200 <= status < 300 and not 400 <= status < 500:
                    Path(tempfile.gettempdir(), f"fuzz-{status}-{seed}-{counts[str(status)]}").write_bytes(data)
            except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
                counts["no answer: the request has no end"] += 1
                client.close()
            except asyncio.LimitOverrunError:
                counts["no answer: not HTTP"] += 1
                client.close()
            if order.random() < 0.3:
                client.close()
        client.close()

    await asyncio.gather(*(worker(seed) for seed in range(16)))
    status = (await Client(server.port).ask(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"))[0]
    memory = f"memory {start:.0f} MB at the start, {server.memory_mb():.0f} MB at the end"
    print(f"fuzz, {seconds:g} s: {dict(sorted(counts.items()))}; healthz {status}; {memory}", flush=True)
    if status != 200 or any(key[:1] in "135" and key.isdigit() for key in counts):
        sys.exit("the fuzz has failed")


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="requests of the soak (10000); 0: no soak")
    parser.add_argument("--stops", type=int, default=10, help="stops under load (10)")
    parser.add_argument("--fuzz-s", type=float, default=0.0, help="time of the fuzz (0)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        path = write_version(directory / "fashion")
        write_text_version(directory / "text")
        cases = make_cases(ServedModel(path, 1, "model.onnx", 1))
        if arguments.requests:
            server = Server(directory, directory / "fashion")
            asyncio.run(soak(server, cases, arguments.requests))
            server.stop()
        total: Counts = collections.Counter()
        for _ in range(arguments.stops):
            total += asyncio.run(stop_under_load(Server(directory, directory / "fashion"), cases))
        if arguments.stops:
            print(f"{arguments.stops} stops under load: {dict(total)}", flush=True)
        if any(key.startswith(("lost", "wrong")) for key in total):
            sys.exit("a request was lost")
        if arguments.fuzz_s:
            for name, seeds, share in (("fashion", fuzz_seeds(), 0.8), ("text", text_seeds(), 0.2)):
                server = Server(directory, directory / name)
                asyncio.run(fuzz(server, seeds, share * arguments.fuzz_s))
                server.stop()


if __name__ == "__main__":
    main()
