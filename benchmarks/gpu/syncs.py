"""Host syncs of the default recipe between two log points, as torch.cuda.set_sync_debug_mode finds them."""

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from gpu.options import PROMISED, Options
from gpu.result import Result, table
from gpu.runs import execute_all

PROGRAM = Path(__file__).with_name("sync_debug.py")
STEPS = 900  # two epochs, most of their steps replayed
HEADER = ("run", "steps watched", "syncs", "places")


ALL = tuple(product(("bf16", "fp32", "fp16"), ("auto", "off")))


def ask(result: Result, options: Options, runs: Sequence[tuple[str, str]] = ALL) -> None:
    """Count the warnings of runs, each with a precision and a value of train.cuda_graph."""
    with tempfile.TemporaryDirectory(prefix="syncs-") as scratch:
        common = [sys.executable, str(PROGRAM), f"run.dir={scratch}", f"train.max_steps={options.size(STEPS, 80)}"]
        common += ["train.check_replicas_every=1000000"]  # the check reads values of the GPU, every 500 steps
        commands = {}
        for precision, graph in runs:
            words = [f"run.name={precision}-{graph}", f"precision={precision}", f"train.cuda_graph={graph}"]
            commands[precision, graph] = [*common, *words]
        rows = []
        for (precision, graph), run in execute_all(commands):
            name, lines = f"{precision}, train.cuda_graph={graph}", run.stdout.splitlines()
            found = json.loads(lines[-1]) if not run.status and lines else {"steps": 0, "syncs": {run.reason(): 1}}
            syncs, steps = found["syncs"], found["steps"]
            rows.append((name, steps, sum(syncs.values()), "; ".join(f"{place} ({n})" for place, n in syncs.items())))
            result.show("syncs", table(HEADER, rows))
            if precision in PROMISED:
                ok = steps > 0 and not syncs
                result.promise(
                    f"{name}: no host sync between log points", ok, f"{sum(syncs.values())} in {steps} steps"
                )
