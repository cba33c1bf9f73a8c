"""The default recipe in each precision, with and without a CUDA graph: does it train, how well and how fast."""

import json
import tempfile
from pathlib import Path

from gpu.options import PROMISED, Options
from gpu.result import Result, table
from gpu.runs import Ended, command, execute, graph_warning, summary

EPOCHS = 8  # of the default recipe
HEADER = ("run", "test accuracy", "images/s", "ms per epoch", "start, s", "total, s", "GPU memory, MiB", "CUDA graph")


def ask(result: Result, options: Options) -> None:
    """Train one run after the other; the first three are those with the default settings for the graph."""
    rows, notes = [], []
    with tempfile.TemporaryDirectory(prefix="recipe-") as scratch:
        for graph in ("auto", "off"):
            for precision in ("bf16", "fp32", "fp16"):
                run, name = Path(scratch) / f"{precision}-{graph}", f"{precision}, train.cuda_graph={graph}"
                settings = [f"train.epochs={options.size(EPOCHS)}", *shorter(options)]
                ended = execute(command(run, f"precision={precision}", f"train.cuda_graph={graph}", *settings))
                rows.append((name, *figures(run, ended, graph)))
                lines = dict.fromkeys(ended.stderr.splitlines())
                notes += [f"{name}: {line}" for line in lines if line.strip()]
                result.show("runs", table(HEADER, rows))
                result.show("stderr", "\n".join(["On stderr:", "", *(f"- {note}" for note in notes or ["nothing"])]))
                promises(result, options, name, precision, graph, run, ended)


def shorter(options: Options) -> list[str]:
    """Return the settings of a run that is shorter than the recipe, if the sizes are scaled."""
    return [] if options.scale == 1 else [f"train.max_steps={options.size(469 * EPOCHS, 20)}"]


def figures(run: Path, ended: Ended, graph: str) -> tuple[object, ...]:
    """Return the cells of a run."""
    if ended.status:
        return (f"failed, status {ended.status}",) + ("",) * (len(HEADER) - 2)
    found = summary(run)
    per_epoch = 1e3 * found["train_s"] / max(1, found["epochs"])
    captured = "no" if graph == "off" or graph_warning(ended.stderr) else "yes"
    return (
        f"{found['test_accuracy']:.2%}",
        f"{found['train_images_per_s']:,.0f}",
        f"{per_epoch:,.0f}",
        f"{found['start_s']:.1f}",
        f"{ended.seconds:.1f}",
        peak_mib(run),
        captured,
    )


def peak_mib(run: Path) -> str:
    """Return the largest amount of GPU memory of tensors that the records contain."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    peaks = [record["gpu_memory_gib"] * 1024 for record in records if "gpu_memory_gib" in record]
    return f"{max(peaks):,.0f}" if peaks else ""


def promises(result: Result, options: Options, name: str, precision: str, graph: str, run: Path, ended: Ended) -> None:
    """Add the promises about one run."""
    result.promise(f"{name}: the run ends with status 0", ended.status == 0, ended.reason() if ended.status else "")
    if ended.status:
        return
    accuracy, least = summary(run)["test_accuracy"], options.required["accuracy"]
    result.promise(f"{name}: the accuracy is at least {least:.0%}", accuracy >= least, f"{accuracy:.2%}")
    if precision in PROMISED:
        lines = ended.stderr.splitlines()
        result.promise(f"{name}: nothing on stderr", not lines, f"{len(lines)} lines" if lines else "")
        if graph == "auto":
            warning = graph_warning(ended.stderr)
            result.promise(f"{name}: the step is a CUDA graph", not warning, warning)
