"""Images per second: this package, the plain recipe, Lightning, and the bare graph replay."""

import importlib.util
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from throughput import unpack

from gpu.options import PROMISED, Options
from gpu.result import Result, table
from gpu.runs import graph_warning
from gpu.turns import Measured, measure

BATCHES = (64, 256, 1024, 4096)
PROMISED_BATCH = 1024
ROUNDS, TURN_S = 3, 0.25
WORKERS = 8  # of the row "plain, with workers"
IMAGES = 2**19  # of random data in GPU memory; all batches divide it, and it is an epoch of at least 128 steps
CONTIGUOUS = "ours, model.channels_last=false"  # without tensor cores, cuDNN has slower kernels for channels-last
HEADER = ("contestant", "images/s", "lowest to highest", "ours is faster by", "peak GPU memory, MiB")


def bf16(result: Result, options: Options) -> None:
    """Measure in bf16."""
    ask(result, options, "bf16")


def fp32(result: Result, options: Options) -> None:
    """Measure in fp32."""
    ask(result, options, "fp32")


def fp16(result: Result, options: Options) -> None:
    """Measure in fp16."""
    ask(result, options, "fp16")


def our_words(batch: int, precision: str, scratch: Path, name: str, options: Options, *settings: str) -> list[str]:
    """Return the words of a contestant that trains with this package, on random images in GPU memory."""
    images = IMAGES if options.scale == 1 else 8 * batch
    common = ["data.name=synthetic", f"data.synthetic_train={images}", "data.synthetic_test=1000"]
    common += ["train.epochs=100000", "optim.lr=0.02", f"run.dir={scratch}", f"run.name={name}"]
    common += ["train.cuda_graph=auto", "distributed.step_timeout_s=900", "distributed.init_timeout_s=900"]
    return ["ours", f"--batch={batch}", f"--precision={precision}", *common, *settings]


def ask(
    result: Result, options: Options, precision: str, batches: Sequence[int] = BATCHES, promised: int = PROMISED_BATCH
) -> None:
    """Measure all contestants in one precision, and add the promises about one batch size."""
    result.show("how", HOW)
    lightning = importlib.util.find_spec("lightning") is not None
    with tempfile.TemporaryDirectory(prefix="speed-") as directory:
        scratch = Path(directory)
        unpack(scratch)
        contestants = {}
        for batch in batches:
            peer = [f"--batch={batch}", f"--precision={precision}", f"--directory={scratch}"]
            contestants[f"ours, {batch}"] = our_words(batch, precision, scratch, f"run-{batch}", options)
            if batch == promised and precision == "fp32":
                run = f"run-{batch}-contiguous"
                contestants[f"{CONTIGUOUS}, {batch}"] = our_words(
                    batch, precision, scratch, run, options, "model.channels_last=false"
                )
            contestants[f"bare graph replay, {batch}"] = ["limit", *peer]
            contestants[f"plain, {batch}"] = ["plain", *peer]
            if lightning:
                contestants[f"lightning, {batch}"] = ["lightning", *peer]
            if batch == promised:
                contestants[f"plain on prepared tensors, {batch}"] = ["plain", *peer, "--data=tensors"]
        measured = measure(contestants, scratch, options.size(ROUNDS), TURN_S * options.scale)
    for batch in batches:
        rows = {name.rpartition(",")[0]: found for name, found in measured.items() if name.endswith(f", {batch}")}
        text = speed_table(batch, rows) + ("" if lightning else "\n\nlightning: not installed")
        result.show(f"{batch}", f"### {precision}, batch {batch}\n\n{text}")
        if warning := graph_warning(rows["ours"].log):
            result.show(f"{batch} graph", f"No graph: {warning}")
        if batch == promised and precision in PROMISED:
            ours = CONTIGUOUS if CONTIGUOUS in rows else "ours"
            promises(result, options, f"{precision}, batch {batch}{ours.removeprefix('ours')}", rows, ours)


HOW = """\
Each contestant is one process that keeps its GPU memory and waits for its turn. A turn is about 0.25 s of steps after
a fifth as many steps that are not timed; the order rotates. The plain recipe is torchvision's data set and transforms,
DataLoader without workers, DistributedDataParallel; ours has random images of the same size in GPU memory, and its
logging and checks, but the ends of epochs (evaluation, checkpoint) are not timed. The bare graph replay is forward,
loss, backward and fused SGD on one fixed batch, with this package's settings of cuDNN (deterministic, no TF32)."""


def ratios(rows: dict[str, Measured], name: str, ours: str = "ours") -> list[float]:
    """Return how many times faster the contestant ``ours`` is than another, in each round."""
    if rows[ours].failure or rows[name].failure:
        return []
    return [other / own for own, other in zip(rows[ours].step_s(), rows[name].step_s(), strict=True)]


def speed_table(batch: int, rows: dict[str, Measured]) -> str:
    """Return the table of a batch size."""
    lines = []
    for name, found in rows.items():
        if found.failure:
            lines.append((name, "failed", found.failure, "", ""))
            continue
        speeds, times = [batch / step_s for step_s in found.step_s()], ratios(rows, name)
        ratio = f"{statistics.median(times):.2f} × ({min(times):.2f} to {max(times):.2f})" if times else ""
        spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
        peak = f"{found.median('peak_mib'):,.0f}"
        lines.append((name, f"{statistics.median(speeds):,.0f}", spread, "" if name == "ours" else ratio, peak))
    return table(HEADER, lines)


def promises(result: Result, options: Options, text: str, rows: dict[str, Measured], ours: str = "ours") -> None:
    """Add the promises about the speed of the contestant ``ours``."""
    for key, name, words in (
        ("plain", "plain", "times the speed of the plain recipe"),
        ("replay", "bare graph replay", "of the speed of the bare graph replay"),
    ):
        times, least = ratios(rows, name, ours), options.required[key]
        failure = "; ".join(filter(None, (rows[ours].failure, rows[name].failure)))
        found = f"{statistics.median(times):.2f}" if times else failure
        result.promise(f"{text}: at least {least:g} {words}", bool(times) and statistics.median(times) >= least, found)
