"""Kill ranks and agents of a run at random moments, and show that it ends as if nothing had happened.

``make chaos [ARGS="--kills 200"]`` trains a run in peace, then again under torchrun while SIGKILLs hit its ranks, or
the agent, which is then started again as a scheduler would. At the end the weights must be those of the first run,
to the bit, and the ledger must have each image of each epoch once. Also prints what a recovery costs, beside the bare
cost of starting Python, importing torch and joining a group.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
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
    "train.log_every=100",
    "optim.lr=0.05",
    "checkpoint.every_steps=10",
    "checkpoint.max_restarts_without_progress=1000000",
    "run.name=run",
)
EPOCHS_PER_KILL = 3
LIMIT_S = 120.0  # to recover once

# torch's optimizers and DistributedDataParallel import torch._dynamo when they are first used: another second or so.
JOIN = """
import sys, torch, torch.distributed as dist
if "dynamo" in sys.argv:
    import torch._dynamo
dist.init_process_group("gloo")
dist.all_reduce(torch.zeros(1))
print("joined", flush=True)
"""


def launch(ranks: int, *words: object, log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun's agent, which starts the ranks, as often as need be."""
    agent = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000000")
    command = [sys.executable, *agent, *(str(word) for word in words)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        )


def children(pid: int) -> list[int]:
    """List the processes that ``pid`` has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def bare_cost(ranks: int, folder: Path, *more: str) -> float:
    """Return the seconds from starting the ranks' processes until all have joined a group; the median of 5 times."""
    script = folder / "join.py"
    script.write_text(JOIN)
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    seconds = []
    for attempt in range(5):
        port = {"MASTER_PORT": str(23_400 + attempt)}
        started = time.monotonic()
        processes = [
            subprocess.Popen(
                [sys.executable, script, *more],
                env={**os.environ, **place, **port, "RANK": str(rank)},
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"joined\n"
        seconds.append(time.monotonic() - started)
        for process in processes:
            process.wait()
    return statistics.median(seconds)


class Ledger:
    """What the run's ledger tells while it is written."""

    def __init__(self, run: Path) -> None:
        """Read the ledger of the run folder ``run``."""
        self.folder = run / "ledger"

    def starts(self) -> list[Path]:
        """Return the folders of the starts that came to a step, in their order."""
        folders = sorted(self.folder.glob("*-from-*"))
        return [folder for folder in folders if any(path.stat().st_size for path in folder.glob("rank-*.jsonl"))]

    def steps_repeated(self) -> int:
        """Count the optimizer steps that were taken more than once."""
        steps = 0
        for folder in self.starts():
            steps += max(path.read_text().count("\n") for path in folder.glob("rank-*.jsonl"))
        return steps


def digest(run: Path) -> dict[str, torch.Tensor]:
    """Return the final weights."""
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    return dict(torch.load(newest, weights_only=True, map_location="cpu")["model"])


def wait_for_start(number: int, ledger: Ledger, agent: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until more than ``number`` starts came to a step, or the run ended."""
    deadline = time.monotonic() + LIMIT_S
    while len(ledger.starts()) <= number and agent.poll() is None:
        if time.monotonic() > deadline:
            sys.exit(f"{log.read_text()[-6000:]}\nno step for {LIMIT_S} s")
        time.sleep(0.005)


def torment(arguments: argparse.Namespace, folder: Path, words: list[str]) -> None:
    """Train while killing; print what it cost."""
    chance = random.Random(arguments.seed)
    log, ledger = folder / "log.txt", Ledger(folder / "run")
    command = ("-m", "distlenet.train", *words, f"run.dir={folder}")
    agent, recoveries, killed = launch(arguments.ranks, *command, log=log), [], {"rank": 0, "agent": 0}
    wait_for_start(0, ledger, agent, log)
    while sum(killed.values()) < arguments.kills and agent.poll() is None:
        # In one case of three the next kill comes while the ranks are starting: up to a second after the last.
        time.sleep(chance.uniform(0.0, 1.0))
        what = "agent" if chance.random() < 0.2 else "rank"
        ranks = children(agent.pid)
        victim = agent.pid if what == "agent" else chance.choice(ranks) if ranks else None
        if victim is None:
            continue
        before, at = len(ledger.starts()), time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed[what] += 1
        if what == "agent":
            agent.wait()
            agent = launch(arguments.ranks, *command, log=log)
        if chance.random() < 2 / 3:
            wait_for_start(before, ledger, agent, log)
            if what == "rank" and agent.poll() is None:
                recoveries.append(time.monotonic() - at)
    if agent.wait() != 0 or sum(killed.values()) < arguments.kills:
        sys.exit(f"{log.read_text()[-6000:]}\nstatus {agent.returncode} after {killed} kills")
    bare, with_dynamo = bare_cost(arguments.ranks, folder), bare_cost(arguments.ranks, folder, "dynamo")
    starts = [json.loads(line) for line in (folder / "run/starts.jsonl").read_text().splitlines()]
    steps = json.loads((folder / "run/summary.json").read_text())["steps"]
    print(f"kills: {killed['rank']} of ranks, {killed['agent']} of agents; starts of the run: {len(starts)}")
    print(f"steps: {steps}, and {ledger.steps_repeated() - steps} repeated")
    median = statistics.median(recoveries)
    most = max(recoveries)
    print(f"from a rank's death to the next step: median {median:.2f} s, at most {most:.2f} s, of {len(recoveries)}")
    print(f"to start Python, import torch and join a group: {bare:.2f} s; ratio of the medians {median / bare:.2f}")
    print(f"the same with what any torch.optim imports: {with_dynamo:.2f} s; ratio {median / with_dynamo:.2f}")


def main() -> None:
    """Train twice and compare; leave with status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs (30)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and victims (0)")
    arguments = parser.parse_args()
    words = [*SETTINGS, f"train.epochs={max(10, EPOCHS_PER_KILL * arguments.kills)}"]
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        whole.mkdir()
        broken.mkdir()
        agent = launch(
            arguments.ranks,
            "-m",
            "distlenet.train",
            *words,
            f"run.dir={whole}",
            "data.ledger=false",
            log=whole / "log.txt",
        )
        if agent.wait() != 0:
            sys.exit((whole / "log.txt").read_text())
        torment(arguments, broken, words)
        a, b = digest(whole / "run"), digest(broken / "run")
        equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        verdict = subprocess.run(
            [sys.executable, "-m", "distlenet.ledger", broken / "run"], capture_output=True, text=True, check=False
        )
        print((verdict.stdout + verdict.stderr).splitlines()[-1])
        print("weights: equal to the bit" if equal else "weights: NOT equal")
    sys.exit(not (equal and verdict.returncode == 0))


if __name__ == "__main__":
    main()
