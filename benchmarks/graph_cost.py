"""Count what a replayed step of the default recipe costs on a GPU, without one: on the fake runtime of the tests.

Prints Markdown: the nodes of the step's CUDA graph by phase, those of the bare step (forward, loss, backward and
optimizer on fixed tensors), and per step launches outside of the graph, host syncs and the time of the host.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO / "tests"))

from fake_cuda.build import library  # noqa: E402

CASES = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    "bf16, shift": ("precision=bf16", "data.augment=shift"),
}


def cost(*settings: str) -> dict[str, Any]:
    """Return what the program prints for ``settings``."""
    paths = os.pathsep.join((str(REPO), str(REPO / "tests")))
    environ = {**os.environ, "LD_PRELOAD": str(library()), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    program = REPO / "tests/fake_cuda/step_cost_program.py"
    command = [sys.executable, "-m", "fake_cuda.launch", str(program), *settings]
    ended = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    costs = {name: cost(*settings) for name, settings in CASES.items()}
    phases = list(costs["fp32"]["phases"])
    print("|", *costs, sep=" | ", end=" |\n")
    print("| --- |", " ---: |" * len(costs), sep="")
    rows = {phase: [str(each["phases"][phase]) for each in costs.values()] for phase in phases}
    rows["nodes of the graph"] = [f"**{len(each['nodes'])}**" for each in costs.values()]
    rows["nodes of the bare step"] = [str(each["bare nodes"]) for each in costs.values()]
    rows["launches and copies outside, per step"] = [f"{each['launches per step']:.2f}" for each in costs.values()]
    rows["host syncs per step"] = [f"{each['syncs per step']:g}" for each in costs.values()]
    times = [each["host us per step"] for each in costs.values()]
    rows["host, µs per step: lowest and median"] = [f"{low:.0f}, {median:.0f}" for low, median in times]
    for name, values in rows.items():
        print("|", name, "|", " | ".join(values), "|")


if __name__ == "__main__":
    main()
