"""ResNet-18 at 224×224 in bf16 and channels-last format: this package and the same loop by hand."""

import tempfile
from pathlib import Path

import numpy as np

from gpu.options import Options
from gpu.resnet_by_hand import CLASSES, SIZE
from gpu.result import Result, table
from gpu.runs import graph_warning
from gpu.speed import ROUNDS, ratios
from gpu.turns import Measured, measure

BATCH, PRECISION, TURN_S = 128, "bf16", 0.5
IMAGES = 5120  # 40 steps


def ask(result: Result, options: Options) -> None:
    """Measure milliseconds per step."""
    batch = options.size(BATCH, 4)
    with tempfile.TemporaryDirectory(prefix="resnet-") as directory:
        scratch = Path(directory)
        write_arrays(scratch / "images", options.size(IMAGES, 2 * batch))
        words = ["ours", f"--batch={batch}", f"--precision={PRECISION}", "data.name=array"]
        words += [f"data.root={scratch / 'images'}", "model.name=torchvision.models:resnet18"]
        words += [f"model.args.num_classes={CLASSES}", "train.epochs=100000", "optim.lr=0.02", f"run.dir={scratch}"]
        words += ["distributed.step_timeout_s=900", "distributed.init_timeout_s=900"]
        by_hand = [f"--batch={batch}", f"--precision={PRECISION}"]
        contestants = {
            "ours": [*words, "train.cuda_graph=auto", "run.name=graph"],
            "ours, no graph": [*words, "train.cuda_graph=off", "run.name=eager"],
            "by hand, replayed": ["resnet-graph", *by_hand],
            "by hand": ["resnet", *by_hand],
        }
        rows = measure(contestants, scratch, options.size(ROUNDS), TURN_S * options.scale)
    result.show("steps", resnet_table(batch, rows))
    if warning := graph_warning(rows["ours"].log):
        result.show("graph", f"No graph: {warning}")
    times = sorted(ratios(rows, "by hand"))
    failure = rows["ours"].failure or rows["by hand"].failure
    found = f"{times[len(times) // 2]:.2f} times its speed" if times else failure
    not_slower = bool(times) and times[len(times) // 2] >= 0.97  # three turns of half a second differ by about 1 %
    result.promise(f"ResNet-18, batch {batch}, {PRECISION}: not slower than the loop by hand", not_slower, found)


def write_arrays(directory: Path, images: int) -> None:
    """Write random images and labels for ``data.name=array``."""
    directory.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("test", 256)):
        np.save(directory / f"{split}_images.npy", random.integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))
        np.save(directory / f"{split}_labels.npy", np.arange(count) % CLASSES)


def resnet_table(batch: int, rows: dict[str, Measured]) -> str:
    """Return the table of all contestants."""
    lines = []
    for name, found in rows.items():
        if found.failure:
            lines.append((name, "failed", found.failure, "", ""))
            continue
        times = sorted(1e3 * step_s for step_s in found.step_s())
        median, spread = times[len(times) // 2], f"{times[0]:.2f} to {times[-1]:.2f}"
        memory = f"{found.median('peak_mib'):,.0f}"
        lines.append((name, f"{median:.2f}", spread, f"{batch / median * 1e3:,.0f}", memory))
    return table(("loop", "ms per step", "lowest to highest", "images/s", "peak GPU memory, MiB"), lines)
