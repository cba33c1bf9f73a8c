"""Time per step of two versions of the package, in turns of a few steps.

``python benchmarks/compare_steps.py OTHER_TREE [--ranks 2] [--batch 64] [--rounds 200] [key=value]...``. The ranks of
both versions run at the same time, but only one version takes steps: each takes ``--steps`` steps, then the other. A
turn takes a fraction of a second; therefore slow changes of the machine's speed cancel in the ratio of two turns.
Give the present tree as OTHER_TREE to see how far the ratio of equal versions differs from 1, or, with ``--here``, to
compare two settings.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
WARM_UP_TURNS = 3
MANY_EPOCHS = 10_000


class Version:
    """The ranks of one version; they wait before each turn."""

    def __init__(self, tree: Path, directory: Path, arguments: argparse.Namespace, more: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        common = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "MASTER_PORT": port}
        common |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(arguments.ranks)}
        common |= {"LOCAL_WORLD_SIZE": str(arguments.ranks), "STEPS_PER_TURN": str(arguments.steps)}
        settings = [
            f"train.epochs={MANY_EPOCHS}",
            f"train.global_batch_size={arguments.batch}",
            *arguments.overrides,
            *more,
        ]
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, f"run.dir={directory}", *settings],
                cwd=directory,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(arguments.ranks)
        ]

    def turn(self) -> float:
        """Let all ranks take their steps, and return the seconds of the slowest."""
        for process in self.processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(lines):
            sys.exit("a rank ended; see its output above")
        return max(map(float, lines))

    def close(self) -> None:
        """End the ranks, which wait for their next turn."""
        for process in self.processes:
            process.communicate()


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds per step of both versions, and the median and quartiles of the ratio of speeds."""
    with ExitStack() as stack:
        versions = []
        for tree, more in ((arguments.tree, ()), (HERE, arguments.here)):
            directory = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            versions.append(Version(tree.resolve(), Path(directory), arguments, more))
            stack.callback(versions[-1].close)
        for version in versions * WARM_UP_TURNS:
            version.turn()
        seconds: list[list[float]] = [[], []]
        for turn in range(arguments.rounds):
            for number in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds[number].append(versions[number].turn())
    ratios = [other / ours for other, ours in zip(*seconds, strict=True)]
    low, median, high = statistics.quantiles(ratios)
    other_ms, our_ms = (statistics.median(values) / arguments.steps * 1e3 for values in seconds)
    return {"other_ms": other_ms, "our_ms": our_ms, "speed_ratio": median, "quartiles": [low, high]}


def train_in_turns(settings: Sequence[str]) -> None:
    """Train as one rank: before each turn wait for a line on stdin, after it print its seconds; exit if stdin ends."""
    from distlenet.training.trainer import Trainer

    steps, results = int(os.environ["STEPS_PER_TURN"]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the results alone go to stdout

    class InTurns(Trainer):
        taken, turn_start = 0, 0.0

        def step(self, batch: Any) -> Any:
            if self.taken % steps == 0:
                if self.taken:
                    print(time.perf_counter() - self.turn_start, file=results, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)
                self.turn_start = time.perf_counter()
            self.taken += 1
            return super().step(batch)

    sys.argv[1:] = settings
    import_module("distlenet.train").main(trainer_class=InTurns)


def main() -> None:
    """Compare, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", metavar="OTHER_TREE", type=Path, help="a checkout of the other version")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings of both versions")
    parser.add_argument(
        "--here", metavar="key=value", action="append", default=[], help="a setting of this version only"
    )
    for name, default, text in (
        ("ranks", 2, "ranks of each version"),
        ("batch", 64, "global batch size"),
        ("steps", 20, "steps of a turn"),
        ("rounds", 200, "turns of each version"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    print(json.dumps(compare(parser.parse_intermixed_args())))


if __name__ == "__main__":
    if "STEPS_PER_TURN" in os.environ:
        train_in_turns(sys.argv[1:])
    else:
        main()
