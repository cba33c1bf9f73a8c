"""Kill ranks and agents of a run at random times, and check that the result is that of an undisturbed run.

``make chaos [ARGS="--kills 200"]`` trains a run undisturbed, then again under torchrun with a warm start, as the launch
scripts do, while ranks are killed, or the fork server and a rank, or the agent, which is then started again as a
scheduler would do. At the end the weights must be bit-identical, and the ledger
must contain each image of each epoch once. Also prints the time of a recovery, compared with the time to start Python,
import torch and join a process group.
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
EPOCHS_PER_KILL, STEPS_PER_EPOCH = 3, 23
LIMIT_S = 120.0  # per recovery

# On a fast machine, or while this program stands still, the run must not end before the last kill: one of its last
# steps waits. Its number ends in 5, so that a start that resumes from a checkpoint takes a step before it.
PROGRAM = """
from distlenet.utils.process import exit_with_agent
from distlenet.utils.startup import exit_on_stop_request
exit_with_agent()  # as ``-m distlenet.train``, before the imports that take seconds
exit_on_stop_request()
import sys, time
from pathlib import Path
from distlenet.distributed.entry_point import run_entry
from distlenet.train import main
from distlenet.training.trainer import Trainer
all_sent, held_step = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
class KilledTrainer(Trainer):
    def step(self, batch):
        while self.state.step == held_step and not all_sent.exists():
            time.sleep(0.01)
        return super().step(batch)
run_entry(lambda: main(trainer_class=KilledTrainer))
"""

# The optimizers and DistributedDataParallel of torch import torch._dynamo on first use, which takes about a second.
JOIN = """
import sys, torch, torch.distributed as dist
if "dynamo" in sys.argv:
    import torch._dynamo
dist.init_process_group("gloo")
dist.all_reduce(torch.zeros(1))
print("joined", flush=True)
"""
STARTS = (
    ("to start Python, import torch and join a group",),
    ("the same with torch._dynamo, which torch.optim imports", "dynamo"),
)


def launch(ranks: int, *words: object, log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun's agent, which restarts the ranks without limit."""
    agent = ("-m", "distlenet.launch", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000000")
    command = [sys.executable, *agent, *(str(word) for word in words)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        )


def epochs(kills: int) -> int:
    """Return the length of a run with that many kills."""
    return max(10, EPOCHS_PER_KILL * kills)


def children(pid: int) -> list[int]:
    """Return the child processes of ``pid``."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def startup_s(ranks: int, trials: int, directory: Path, *options: str) -> float:
    """Return the median time of ``trials`` from starting the ranks' processes until all have joined a group."""
    script = directory / "join.py"
    script.write_text(JOIN)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    seconds = []
    for attempt in range(trials):
        port = {"MASTER_PORT": str(23_400 + attempt)}
        started = time.monotonic()
        processes = [
            subprocess.Popen(
                [sys.executable, script, *options],
                env={**os.environ, **common, **port, "RANK": str(rank)},
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
    """The ledger of a run in progress."""

    def __init__(self, run: Path) -> None:
        """Read the ledger of the run directory ``run``."""
        self.directory = run / "ledger"

    def starts(self) -> list[Path]:
        """Return the directories of the starts that reached a step, in order."""
        starts = sorted(self.directory.glob("*-from-*"))
        return [start for start in starts if any(path.stat().st_size for path in start.glob("rank-*.jsonl"))]

    def steps_taken(self) -> int:
        """Count the optimizer steps of all starts, including repeated ones."""
        steps = 0
        for directory in self.starts():
            steps += max(path.read_text().count("\n") for path in directory.glob("rank-*.jsonl"))
        return steps


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the final weights."""
    newest = sorted((run / "checkpoints").glob("step-*.pt"))[-1]
    return dict(torch.load(newest, weights_only=True, map_location="cpu")["model"])


def wait_for_start(number: int, ledger: Ledger, agent: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until more than ``number`` starts have reached a step, or the run has ended."""
    deadline = time.monotonic() + LIMIT_S
    while len(ledger.starts()) <= number and agent.poll() is None:
        if time.monotonic() > deadline:
            sys.exit(f"{log.read_text()[-6000:]}\nno step for {LIMIT_S} s")
        time.sleep(0.005)


def train_with_kills(arguments: argparse.Namespace, directory: Path, words: list[str]) -> None:
    """Train while killing; print the cost."""
    random_ = random.Random(arguments.seed)
    log, ledger = directory / "log.txt", Ledger(directory / "run")
    script, all_sent = directory / "program.py", directory / "all-sent"
    script.write_text(PROGRAM)
    held_step = (STEPS_PER_EPOCH * epochs(arguments.kills) - 6) // 10 * 10 + 5
    command = (script, all_sent, held_step, *words, f"run.dir={directory}")
    agent, recoveries = launch(arguments.ranks, *command, log=log), []
    killed = {"rank": 0, "fork server": 0, "agent": 0}
    wait_for_start(0, ledger, agent, log)
    while sum(killed.values()) < arguments.kills and agent.poll() is None:
        # One kill in three is sent while the ranks are starting, up to a second after the previous one.
        time.sleep(random_.uniform(0.0, 1.0))
        what = random_.choices(("rank", "fork server", "agent"), (7, 1, 2))[0]
        server, *ranks = children(agent.pid) or [0]  # in the order of their starts
        if not ranks and what != "agent":
            continue
        victims = {"rank": [random_.choice(ranks or [0])], "agent": [agent.pid]}
        victims["fork server"] = [server, *victims["rank"]]  # without it, ranks start in new interpreters
        starts, killed_at = len(ledger.starts()), time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            for victim in victims[what]:
                os.kill(victim, signal.SIGKILL)
            killed[what] += 1
        if what == "agent":
            agent.wait()
            agent = launch(arguments.ranks, *command, log=log)
        if random_.random() < 2 / 3:
            wait_for_start(starts, ledger, agent, log)
            if what == "rank" and agent.poll() is None:
                recoveries.append(time.monotonic() - killed_at)
    all_sent.touch()
    if agent.wait() != 0 or sum(killed.values()) < arguments.kills:
        sys.exit(f"{log.read_text()[-6000:]}\nstatus {agent.returncode} after {killed} kills")
    starts = [json.loads(line) for line in (directory / "run/starts.jsonl").read_text().splitlines()]
    steps = json.loads((directory / "run/summary.json").read_text())["steps"]
    kills = ", ".join(f"{count} of {what}s" for what, count in killed.items())
    print(f"kills: {kills}; starts of the run: {len(starts)}")
    print(f"steps: {steps}, and {ledger.steps_taken() - steps} repeated")
    if not recoveries:  # few kills may all have been of agents, or sent while ranks were starting
        print("no kill of a rank was followed by a wait for the next step")
        return
    median, longest = statistics.median(recoveries), max(recoveries)
    print(f"from a killed rank to the next step: median {median:.2f} s, at most {longest:.2f} s, of {len(recoveries)}")
    for what, *options in STARTS if arguments.trials else ():
        seconds = startup_s(arguments.ranks, arguments.trials, directory, *options)
        print(f"{what}: {seconds:.2f} s; ratio of the medians {median / seconds:.2f}")


def main() -> None:
    """Train twice and compare; exit with status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs (30)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (2)")
    parser.add_argument("--trials", type=int, default=5, help="measurements of the time to start (5); 0: none")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and victims (0)")
    arguments = parser.parse_args()
    words = [*SETTINGS, f"train.epochs={epochs(arguments.kills)}"]
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
        train_with_kills(arguments, broken, words)
        a, b = final_weights(whole / "run"), final_weights(broken / "run")
        equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        verdict = subprocess.run(
            [sys.executable, "-m", "distlenet.ledger", broken / "run"], capture_output=True, text=True, check=False
        )
        print((verdict.stdout + verdict.stderr).splitlines()[-1])
        print("weights: bit-identical" if equal else "weights: NOT identical")
    sys.exit(not (equal and verdict.returncode == 0))


if __name__ == "__main__":
    main()
