"""``python -m distlenet.serve`` compared with LitServe and with FastAPI and PyTorch: requests per second, and latency.

``python benchmarks/serving.py [--rounds 5] [--seconds 5]``: LeNet on Fashion-MNIST; each request holds one image in the
form of TensorFlow Serving, 28 lists of 28 integers. All processes of a server are on the first core, the client on the
second one, with 64 connections that stay open. All servers run all the time, and are loaded in turns.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent
BODIES = 64
OURS, PLAIN = "distlenet serve", "FastAPI + PyTorch"


def make_run(directory: Path) -> Path:
    """Train LeNet for some steps and return the run directory."""
    words = ["train.max_steps=200", "wandb.mode=disabled", "device=cpu", "run.report=never", "run.name=serving"]
    command = [sys.executable, "-m", "distlenet.train", *words, f"run.dir={directory}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return directory / "serving"


def write_bodies(directory: Path) -> list[Path]:
    """Write request bodies with images like those of Fashion-MNIST: half of the pixels are 0."""
    generator = np.random.default_rng(0)
    files = []
    for number in range(BODIES):
        image = generator.integers(1, 256, (28, 28)) * (generator.random((28, 28)) < 0.5)
        files.append(directory / f"{number}.json")
        files[-1].write_text(json.dumps({"instances": [image.tolist()]}))
    return files


@contextlib.contextmanager
def running(command: list[str], core: int, log: Path) -> Iterator[None]:
    """Run a server on a core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        words = ["taskset", "-c", str(core), *command]
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            yield
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def ask(url: str, body: bytes) -> list[float]:
    """Return the answer to one request."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["predictions"][0]  # type: ignore[no-any-return]


def wait_for(url: str, body: bytes, log: Path) -> list[float]:
    """Return the first answer of a server that starts."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask(url, body)
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(f"{url} does not answer: {log.read_text()}")
            time.sleep(0.2)


def free_port() -> int:
    """Return a port that no process uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def measure(url: str, bodies: list[Path], arguments: argparse.Namespace) -> dict[str, float]:
    """Load a server from the second core."""
    options = ["--connections", str(arguments.connections), "--seconds", str(arguments.seconds)]
    command = ["taskset", "-c", "1", sys.executable, str(DIRECTORY / "http_load.py"), url, *map(str, bodies), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # type: ignore[no-any-return]


def table(results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of the table: medians over the rounds, and ratios within rounds."""
    lines = [
        "| server | requests/s, median (range) | of FastAPI + PyTorch, paired median (range) | p50 | p99 | longest |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, rounds in results.items():
        speeds = [result["requests_per_s"] for result in rounds]
        ratios = [s / plain["requests_per_s"] for s, plain in zip(speeds, results[PLAIN], strict=True)]
        times = (statistics.median(result[key] for result in rounds) for key in ("p50_ms", "p99_ms", "max_ms"))
        lines.append(
            f"| {name} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | "
            + " | ".join(f"{value:.1f} ms" for value in times)
            + " |"
        )
    return lines


def main() -> None:
    """Measure in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server (5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="time of a turn (5)")
    parser.add_argument("--connections", type=int, default=64, help="open connections (64)")
    parser.add_argument("--run", type=Path, help="a run of LeNet on Fashion-MNIST (default: train for 200 steps)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        directory = Path(temporary)
        run = arguments.run or make_run(directory / "runs")
        model = directory / "model"
        export = ["-m", "distlenet.export", str(run), "--to", "onnx", "--check", "random", "--out", str(model)]
        subprocess.run([sys.executable, *export, "--name", "fashion"], check=True, stdout=subprocess.DEVNULL)
        bodies = write_bodies(directory)
        peers = str(DIRECTORY / "serving_peers.py")
        commands = {
            OURS: ["-m", "distlenet.serve", str(model)],
            "LitServe": [peers, "litserve", str(run)],
            PLAIN: [peers, "fastapi", str(run)],
        }
        urls: dict[str, str] = {}
        answers = []
        for name, command in commands.items():
            port = free_port()
            words = [sys.executable, *command, "--port", str(port)]
            stack.enter_context(running(words, 0, directory / f"{port}.log"))
            urls[name] = f"http://127.0.0.1:{port}" + ("/v1/models/fashion:predict" if name == OURS else "/predict")
            answers.append(wait_for(urls[name], bodies[0].read_bytes(), directory / f"{port}.log"))
        if np.ptp(answers, axis=0).max() > 1e-5:
            sys.exit(f"the servers answer differently: {answers}")
        results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for round_ in range(arguments.rounds):
            first = round_ % len(commands)
            for name in [*commands][first:] + [*commands][:first]:
                results[name].append(measure(urls[name], bodies, arguments))
    print(
        f"LeNet on Fashion-MNIST, one image per request, {arguments.connections} connections, the server on one core "
        f"and the client on another one, {arguments.rounds} rounds of {arguments.seconds:g} s.\n"
    )
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
