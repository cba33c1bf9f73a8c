"""A replayed step equals the eager step to the bit, and a repeated run equals the first."""

import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from gpu.options import Options
from gpu.result import Result, table
from gpu.runs import Ended, command, difference, execute_all, graph_warning

# A replay reads the learning rate in float32, so these are exact in it; with a constant schedule no other one occurs.
LEARNING_RATE = {"sgd": "0.03125", "adamw": "0.0009765625"}
STEPS = 1100  # two epochs and a part: also shorter batches, evaluations and saves
KINDS = ("auto", "off", "repeated")
REDUCTIONS = {
    "ddp": ["distributed.reduction=ddp"],
    "exact": ["distributed.reduction=exact", "distributed.virtual_shards=8"],
    "ddp with accumulation": ["distributed.reduction=ddp", "train.accumulation_steps=4"],
}
ALL = (*product(("bf16", "fp32"), ("ddp", "exact"), ("sgd", "adamw")), ("bf16", "ddp with accumulation", "sgd"))
HEADER = ("run", "CUDA graph", "graph and eager", "graph, repeated")


def ask(result: Result, options: Options, combinations: Sequence[tuple[str, str, str]] = ALL) -> None:
    """Compare graph and eager for each precision, reduction and optimizer, and each run with its repetition."""
    with tempfile.TemporaryDirectory(prefix="bits-") as scratch:
        runs = {(*names, kind): Path(scratch) / "-".join((*names, kind)) for names in combinations for kind in KINDS}
        commands = {key: command(run, *settings(*key), *length(options)) for key, run in runs.items()}
        ended: dict[Path, Ended] = {}
        rows = []
        for key, end in execute_all(commands):
            ended[runs[key]] = end
            if key[-1] == KINDS[-1]:
                auto, off, repeated = (runs[(*key[:-1], kind)] for kind in KINDS)
                equal, again = compare(auto, off, ended), compare(auto, repeated, ended)
                text, warning = ", ".join(key[:-1]), graph_warning(ended[auto].stderr)
                rows.append((text, warning or "yes", equal, again))
                result.show("bits", table(HEADER, rows, left=4))
                result.promise(f"{text}: replay equals eager", equal == "equal" and not warning, warning or equal)
                result.promise(f"{text}: a repeated run is equal", again == "equal", again)


def settings(precision: str, reduction: str, optimizer: str, kind: str) -> list[str]:
    """Return the settings of a run."""
    words = [f"precision={precision}", *REDUCTIONS[reduction], f"optim.name={optimizer}"]
    words += [f"optim.lr={LEARNING_RATE[optimizer]}", "optim.schedule=constant", "data.augment=shift"]
    return [*words, f"train.cuda_graph={'off' if kind == 'off' else 'auto'}"]


def length(options: Options) -> list[str]:
    """Return the settings of the length of a run; a scaled one is on the bundled digits."""
    return [f"train.max_steps={options.size(STEPS, 30)}"] + ["data.name=digits"] * (options.scale != 1)


def compare(first: Path, second: Path, ended: Mapping[Path, Ended]) -> str:
    """Return ``equal``, how two runs differ, or which of them failed."""
    failed = [f"{run.name}: {ended[run].reason()}" for run in (first, second) if ended[run].status]
    return "; ".join(failed) or difference(first, second) or "equal"
