"""What a run in an object store costs: the speed of training while the store works, and while it fails.

``python benchmarks/object_store.py [--cycles 6] [--window 15] [--rounds 4] [--every 1000]``: LeNet on Fashion-MNIST,
two ranks, a checkpoint every ``--every`` steps. The S3 server is moto's, on the same machine, and takes CPU time, too.

1. One training, during which the server fails in each of several ways, ``--cycles`` times for ``--window`` seconds.
   The speed in each window is compared with the windows before and after it, in which the server works: trainings
   differ more from each other than the windows of one.
2. ``--rounds`` pairs of trainings, on the disk and in the store, in alternating order.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import boto3
from s3_server import BUCKET, S3Server

FAULTS: dict[str, dict[str, Any]] = {
    "1 s per request": {"kind": "slow", "seconds": 1.0},
    "bucket full": {"kind": "full", "method": "PUT", "path": "checkpoints|metrics"},
    "status 500": {"kind": "error"},
    "connection cut": {"kind": "cut"},
    "wrong key": {"kind": "wrong_key"},
}
SETTLING_S = 1.0  # at the start of a window, not measured: requests from before
START_S = 120.0  # that a training may take until its first record


class Window(NamedTuple):
    """A time during which the server has one fault, or none."""

    fault: str
    start_s: float
    end_s: float


def start_training(directory: Path, every: int, environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    """Start a training of two ranks whose files are below ``directory``."""
    command = [sys.executable, "-m", "distlenet.launch", "--standalone", "--nproc-per-node=2", "-m", "distlenet.train"]
    settings = ["device=cpu", "run.report=never", "wandb.mode=disabled", "run.name=run", f"run.local_dir={directory}"]
    return subprocess.Popen(
        [*command, *settings, f"checkpoint.every_steps={every}", "distributed.init_timeout_s=30", *words],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_with_faults(
    server: S3Server, every: int, faults: list[str], cycles: int, window_s: float
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Return, for each fault, the speeds while it lasts, relative to the mean of before and after; and the requests.

    Requests are also counted without a fault.
    """
    windows: list[Window] = []
    requests: dict[str, list[int]] = {fault: [] for fault in ["", *faults]}
    with tempfile.TemporaryDirectory() as directory:
        words = (f"run.dir=s3://{BUCKET}/faults", "train.epochs=100000")
        process = start_training(Path(directory), every, server.environment, *words)
        history = wait_for_history(Path(directory), process)
        for fault in ["", *[name for each in faults * cycles for name in (each, "")]]:
            server.fail(**FAULTS.get(fault, {}))
            start_s = time.time()
            time.sleep(window_s)
            requests[fault].append(sum(server.fail(**FAULTS.get(fault, {})).values()))
            windows.append(Window(fault, start_s + SETTLING_S, time.time()))
        process.terminate()  # it saves and uploads
        _, stderr = process.communicate(timeout=START_S)
        records = [json.loads(line) for line in history.read_text().splitlines()]
        newest = max(history.parent.glob("checkpoints/step-*.pt"))
        key = f"faults/run/checkpoints/{newest.name}"
        if stored(server, key) != newest.read_bytes():
            sys.exit(f"{key} is not in the store:\n{stderr}")
    speeds = [speed(records, window) for window in windows]
    ratios: dict[str, list[float]] = {fault: [] for fault in faults}
    for number in range(1, len(windows), 2):
        around = (speeds[number - 1] + speeds[number + 1]) / 2
        ratios[windows[number].fault].append(speeds[number] / around)
    return ratios, requests


def wait_for_history(directory: Path, process: subprocess.Popen[str]) -> Path:
    """Return the history of the run below ``directory`` when it has a record of an epoch."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for path in directory.rglob("metrics.jsonl"):
            if '"train_epoch"' in path.read_text():
                return path
        time.sleep(0.5)
    process.terminate()
    sys.exit(process.communicate()[1])


def stored(server: S3Server, key: str) -> bytes:
    """Return an object of the server."""
    values = server.environment
    client = boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=values["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=values["AWS_SECRET_ACCESS_KEY"],
        region_name=values["AWS_DEFAULT_REGION"],
    )
    content: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return content


def speed(records: list[dict[str, Any]], window: Window) -> float:
    """Return the steps per second from log point to log point, checkpoints included, evaluations not."""
    train = [record for record in records if record["split"] == "train"]
    steps, seconds = 0, 0.0
    for before, after in pairwise(train):
        if window.start_s <= before["time"] and after["time"] <= window.end_s and before["epoch"] == after["epoch"]:
            steps += after["step"] - before["step"]
            seconds += after["time"] - before["time"]
    return steps / seconds


def train_once(directory: Path, every: int, environment: dict[str, str], url: str) -> float:
    """Return the images per second of a short training."""
    process = start_training(directory, every, environment, f"run.dir={url}", "train.epochs=4")
    _, stderr = process.communicate()
    summaries = list(directory.rglob("summary.json"))
    if len(summaries) != 1:
        sys.exit(stderr)
    return float(json.loads(summaries[0].read_text())["train_images_per_s"])


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=6, help="windows of each fault (6)")
    parser.add_argument("--window", type=float, default=15.0, help="seconds of a window (15)")
    parser.add_argument("--rounds", type=int, default=4, help="trainings on the disk, and in the store (4)")
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoints (1000)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS], help="default: all of them")
    arguments = parser.parse_args()
    server = S3Server()
    every = arguments.every
    print(f"LeNet on Fashion-MNIST, 2 ranks, a checkpoint every {every} steps.\n")
    if arguments.cycles:
        print(f"One training; each fault {arguments.cycles} times for {arguments.window:g} s:\n")
        ratios, requests = train_with_faults(server, every, arguments.faults, arguments.cycles, arguments.window)
        print("| fault | speed compared with before and after, mean ± standard error | requests, mean |")
        print(f"| --- | ---: | ---: |\n| none | 1 | {statistics.mean(requests['']):.0f} |")
        for fault, values in ratios.items():
            error = statistics.stdev(values) / len(values) ** 0.5
            count = statistics.mean(requests[fault])
            print(f"| {fault} | {statistics.mean(values):.3f} ± {error:.3f} | {count:.0f} |")
    speeds: dict[str, list[float]] = {"disk": [], "store": []}
    for round_ in range(arguments.rounds):
        for case in ("disk", "store") if round_ % 2 else ("store", "disk"):
            with tempfile.TemporaryDirectory() as directory:
                url = f"s3://{BUCKET}/{round_}" if case == "store" else directory
                speeds[case].append(train_once(Path(directory), every, server.environment, url))
    if arguments.rounds:
        print(f"\n{arguments.rounds} trainings of 4 epochs each:\n")
        print("| run.dir | images per second, median (range) | of the disk, paired median |\n| --- | ---: | ---: |")
    for case, values in speeds.items():
        if values:
            ratio = statistics.median(value / disk for value, disk in zip(values, speeds["disk"], strict=True))
            print(
                f"| {case} | {statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f}) | {ratio:.3f} |"
            )


if __name__ == "__main__":
    main()
