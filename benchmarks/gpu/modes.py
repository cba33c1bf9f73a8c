"""What other modes cost: exact reduction, no graph, data on the host, more loader processes; and the host's time."""

import tempfile
from pathlib import Path

from throughput import unpack

from gpu.options import Options
from gpu.result import Result, table
from gpu.runs import graph_warning
from gpu.speed import ROUNDS, TURN_S, WORKERS, our_words, ratios
from gpu.turns import Measured, measure

BATCHES = (256, 1024)
MODES: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours, no graph": ("train.cuda_graph=off",),
    "ours, exact, 1 shard": ("distributed.reduction=exact", "distributed.virtual_shards=1"),
    "ours, exact, 8 shards": ("distributed.reduction=exact", "distributed.virtual_shards=8"),
    "ours, images on the host": ("data.device=cpu",),
    "ours, no records": ("train.log_every=1000000",),
    "ours, not channels-last": ("model.channels_last=false",),
}
PRECISION = "bf16"


def ask(result: Result, options: Options) -> None:
    """Measure the modes at two batch sizes."""
    with tempfile.TemporaryDirectory(prefix="modes-") as directory:
        scratch = Path(directory)
        unpack(scratch)
        contestants = {}
        for batch in BATCHES:
            for number, (name, settings) in enumerate(MODES.items()):
                run = f"run-{batch}-{number}"
                contestants[f"{name}, {batch}"] = our_words(batch, PRECISION, scratch, run, options, *settings)
            words = [f"--batch={batch}", f"--precision={PRECISION}", f"--directory={scratch}", f"--workers={WORKERS}"]
            contestants[f"plain, {WORKERS} workers, {batch}"] = ["plain", *words]
        measured = measure(contestants, scratch, options.size(ROUNDS), TURN_S * options.scale)
    for batch in BATCHES:
        rows = {name.rpartition(",")[0]: found for name, found in measured.items() if name.endswith(f", {batch}")}
        result.show(f"{batch}", f"### {PRECISION}, batch {batch}\n\n{modes_table(batch, rows)}")
        for name in MODES:
            result.promise(f"batch {batch}, {name}: it runs", not rows[name].failure, rows[name].failure)


def modes_table(batch: int, rows: dict[str, Measured]) -> str:
    """Return the table of a batch size."""
    lines = []
    for name, found in rows.items():
        if found.failure:
            lines.append((name, "failed", found.failure, "", "", "", ""))
            continue
        step_s, times = sorted(found.step_s()), ratios(rows, name)
        median_s = step_s[len(step_s) // 2]
        host = f"{1e6 * found.median('host_s') / found.median('steps'):,.0f}"
        ratio = f"{1 / sorted(times)[len(times) // 2]:.2f}" if times else ""
        peak = f"{found.median('peak_mib'):,.0f}"
        # a peer prints no reason, and has no graph
        graph = "" if name not in MODES else "no" if graph_warning(found.log) or "no graph" in name else "yes"
        lines.append((name, f"{batch / median_s:,.0f}", ratio, f"{1e6 * median_s:,.0f}", host, peak, graph))
    header = (
        "mode",
        "images/s",
        "speed / ours",
        "µs per step",
        "host µs per step",
        "peak GPU memory, MiB",
        "CUDA graph",
    )
    note = "Host µs: until the last step of a turn is queued. If the queue is full or a record is due, the host waits."
    return f"{table(header, lines)}\n\n{note}"
