"""Kill ranks of a run, and time how long it takes until the next step: with a warm start of ranks and without.

``python benchmarks/restarts.py [--kills 30]`` trains a run undisturbed, then again while its ranks are killed. The
launcher alternates between ``python -m distlenet.launch``, which forks ranks from a process that has imported
everything (warm), and torchrun, which starts interpreters (cold): after ``--block`` kills, the other one continues the
run. At the end the weights must be bit-identical to those of the undisturbed run.
"""

import argparse
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
from chaos import EPOCHS_PER_KILL, SETTINGS, Ledger, children, final_weights, wait_for_start

LAUNCHERS = {"warm": "distlenet.launch", "cold": "torch.distributed.run"}


def launch(launcher: str, ranks: int, *words: object, log: Path) -> subprocess.Popen[bytes]:
    """Start an agent that restarts the ranks without limit."""
    agent = ("-m", LAUNCHERS[launcher], "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1000000")
    command = [sys.executable, *agent, "-m", "distlenet.train", *(str(word) for word in words)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        )


def ranks_of(agent: int, count: int) -> list[int]:
    """Return the ranks of an agent: its newest children."""
    return children(agent)[-count:]


def main() -> None:
    """Train twice and compare; exit with status 1 if the weights differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills with each launcher (30)")
    parser.add_argument("--block", type=int, default=3, help="kills until the other launcher continues (3)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks (2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and victims (0)")
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    epochs = max(10, 4 * EPOCHS_PER_KILL * arguments.kills)
    seconds: dict[str, list[float]] = {launcher: [] for launcher in LAUNCHERS}
    with tempfile.TemporaryDirectory(prefix="restarts-") as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        for directory in (whole, broken):
            directory.mkdir()
        words = (*SETTINGS, f"train.epochs={epochs}")
        log, ledger = broken / "log.txt", Ledger(broken / "run")
        if launch("cold", arguments.ranks, *words, f"run.dir={whole}", log=whole / "log.txt").wait() != 0:
            sys.exit((whole / "log.txt").read_text())
        agent = None
        while len(seconds["cold"]) < arguments.kills:
            for launcher, times in seconds.items():
                if agent is not None:
                    agent.terminate()
                    agent.wait()
                starts = len(ledger.starts())
                agent = launch(launcher, arguments.ranks, *words, f"run.dir={broken}", log=log)
                wait_for_start(starts, ledger, agent, log)
                for _ in range(min(arguments.block, arguments.kills - len(times))):
                    time.sleep(random_.uniform(0.1, 0.5))
                    starts, killed_at = len(ledger.starts()), time.monotonic()
                    os.kill(random_.choice(ranks_of(agent.pid, arguments.ranks)), signal.SIGKILL)
                    wait_for_start(starts, ledger, agent, log)
                    times.append(time.monotonic() - killed_at)
                    if agent.poll() is not None:
                        sys.exit(f"{log.read_text()[-6000:]}\nthe run ended before the last kill")
        if agent is None or agent.wait() != 0:
            sys.exit(log.read_text()[-6000:])
        print("| start of ranks | from a kill to the next step, median | range | kills |\n| --- | --- | --- | --- |")
        for launcher, times in seconds.items():
            median, span = statistics.median(times), f"{min(times):.2f} to {max(times):.2f} s"
            print(f"| {launcher} | {median:.2f} s | {span} | {len(times)} |")
        a, b = final_weights(whole / "run"), final_weights(broken / "run")
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    print("\nThe weights at the end are " + ("bit-identical" if equal else "NOT identical"))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
