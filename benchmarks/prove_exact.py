"""Check on this machine that ``distributed.reduction=exact`` gives the same bits on any number of ranks.

``make prove-exact`` trains a small run on 1, 2, 4 and 8 ranks, and once more with kills and restarts on other numbers
of ranks, then compares the weights byte by byte. Extra arguments are settings.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SETTINGS = (
    "device=cpu",
    "distributed.reduction=exact",
    "data.name=digits",
    "data.augment=shift",
    "data.ledger=true",
    "train.global_batch_size=64",
    "train.epochs=4",
    "optim.lr=0.1",
    "checkpoint.every_steps=1",
)
LIMIT_S = 300.0  # per run


def start(ranks: int, directory: Path, settings: list[str]) -> list[subprocess.Popen[str]]:
    """Start the ranks of a run in one process group, without torchrun, which gives each rank a separate group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = (sys.executable, "-m", "distlenet.train", *SETTINGS, f"run.dir={directory}", "run.name=run", *settings)
    processes: list[subprocess.Popen[str]] = []
    for rank in range(ranks):
        environ = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(
            subprocess.Popen(
                words,
                env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **environ},
                process_group=processes[0].pid if processes else 0,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for a run; exit with the output of its ranks if it fails."""
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        kill(processes)
    if any(process.returncode for process in processes):
        sys.exit("\n".join(outputs) + f"\nstatus {[process.returncode for process in processes]}")


def kill(processes: list[subprocess.Popen[str]]) -> None:
    """Kill all ranks at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(processes[0].pid, signal.SIGKILL)


def newest_step(directory: Path) -> int:
    """Return the step of the newest checkpoint, or 0."""
    return max((int(path.stem[5:]) for path in (directory / "run/checkpoints").glob("step-*.pt")), default=0)


def kill_after(step: int, processes: list[subprocess.Popen[str]], directory: Path) -> int:
    """Kill a run when it has saved at least ``step`` steps; return the number of saved steps."""
    deadline = time.monotonic() + LIMIT_S
    while newest_step(directory) < step and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    kill(processes)
    outputs = [process.communicate()[0] for process in processes]
    if newest_step(directory) < step or (directory / "run/summary.json").exists():
        sys.exit("\n".join(outputs) + f"\nthe run could not be killed soon after step {step}")
    return newest_step(directory)


def digest(directory: Path) -> tuple[str, float]:
    """Return the SHA-256 of the final weights, and the test loss."""
    path = directory / f"run/checkpoints/step-{newest_step(directory):08d}.pt"
    weights = torch.load(path, weights_only=True, map_location="cpu")["model"]
    content = b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in sorted(weights.items()))
    summary = json.loads((directory / "run/summary.json").read_text())
    return hashlib.sha256(content).hexdigest(), summary["test_loss"]


def main() -> None:
    """Train, kill, compare; exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of ranks (1 2 4 8)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of the proof")
    arguments = parser.parse_intermixed_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="prove-exact-") as scratch:
        for ranks in arguments.ranks:
            directory = Path(scratch) / str(ranks)
            finish(start(ranks, directory, arguments.settings))
            results.append((f"{ranks} ranks", *digest(directory)))
            print("{:44} {:.16}...  test loss {!r}".format(*results[-1]), flush=True)
        directory, story = Path(scratch) / "killed", []
        for number, ranks in enumerate(arguments.ranks, start=1):
            step = kill_after(17 * number, start(ranks, directory, arguments.settings), directory)
            story.append(f"{ranks} until {step}")
        finish(start(arguments.ranks[0], directory, arguments.settings))
        results.append((f"killed: {', '.join(story)}, {arguments.ranks[0]}", *digest(directory)))
        print("{:44} {:.16}...  test loss {!r}".format(*results[-1]), flush=True)
        ledger = subprocess.run([sys.executable, "-m", "distlenet.ledger", directory / "run"], check=False)
    if len({result[1:] for result in results}) != 1 or ledger.returncode != 0:
        sys.exit("NOT identical")
    print(f"{len(results)} runs, all bit-identical")


if __name__ == "__main__":
    main()
