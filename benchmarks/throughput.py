"""Training speed compared with peers, on the same machine, data, network and optimizer.

``python benchmarks/throughput.py [--batches 64 256] [--rounds 5]``. Machines are noisy: in each round, every
contestant runs once, in rotating order; ratios are computed within a round, and their median over the rounds is
reported. The start is the time from a rank's launch to its first step. Prints Markdown; ``--json FILE`` writes all
figures.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from distlenet.data.download import locate_or_download

SECONDS = 4.0  # the approximate duration of a measurement, at ROUGH images/s
LOG_EVERY = 50  # steps; the first window is distlenet's warm-up
ROUGH = {"torchvision": 4000, "tensors": 10000}
PEERS = (
    ("plain", "torchvision"),
    ("lightning", "torchvision"),
    ("accelerate", "torchvision"),
    ("plain", "tensors"),
    ("lightning", "tensors"),
    ("accelerate", "tensors"),
    ("limit", "tensors"),
)
OURS: dict[str, tuple[str, ...]] = {"distlenet": (), "distlenet, exact": ("distributed.reduction=exact",)}
ON_GPU: dict[str, tuple[str, ...]] = {
    "distlenet": (),
    "distlenet, no graph": ("train.cuda_graph=off",),
    "distlenet, images on the host": ("data.device=cpu",),
    "distlenet, exact": ("distributed.reduction=exact",),
}
FASTER_ON_GPU = 10  # factor on the number of steps


@dataclass(frozen=True)
class Setting:
    """The parameters of a measurement."""

    ranks: int
    batch: int  # over all ranks
    device: str
    precision: str

    def __str__(self) -> str:
        """Return the heading of the section."""
        device = f", {self.precision} on a GPU" if self.device == "cuda" else ""
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, global batch {self.batch}{device}"


@dataclass(frozen=True)
class Figures:
    """The result of one run of a contestant."""

    images_per_s: float
    start_s: float


Rounds = dict[str, list[Figures]]
"""The figures of each contestant, by round."""


def torchrun(ranks: int, *words: object, last: str = "") -> str:
    """Run a program on ``ranks`` ranks with one thread each, and return its output.

    A failure ends the benchmark, unless the output contains ``last``: some peers abort when Python exits while threads
    of Gloo still run.
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [*launcher, *map(str, words)]
    ended = subprocess.run(command, env=environ, capture_output=True, text=True)
    if ended.returncode and last and last in ended.stdout:
        print(
            f"exited with status {ended.returncode} after printing its figures: {' '.join(command)}",
            file=sys.stderr,
            flush=True,
        )
    elif ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}\n{ended.stderr}")
    return ended.stdout


def run_peer(peer: str, form: str, setting: Setting, directory: Path) -> Figures:
    """Measure a peer: images/s after its warm-up."""
    steps = max(100, int(SECONDS * ROUGH[form] / setting.batch))
    if setting.device == "cuda" and peer == "limit":
        steps *= FASTER_ON_GPU
    program = Path(__file__).with_name("peers.py")
    words = (program, peer, "--data", form, "--batch", setting.batch, "--steps", steps, "--directory", directory)
    more = ("--device", setting.device, "--precision", setting.precision)
    printed = torchrun(setting.ranks, *words, *more, last='"images_per_s"').splitlines()
    result = json.loads(next(line for line in printed if '"images_per_s"' in line))
    return Figures(result["images_per_s"], result["start_s"])


def run_ours(settings: tuple[str, ...], setting: Setting, directory: Path) -> Figures:
    """Measure distlenet, including metering, logging and checks."""
    batch, device = setting.batch, setting.device
    steps = max(300, int(SECONDS * 2 * ROUGH["tensors"] / batch)) * (FASTER_ON_GPU if device == "cuda" else 1)
    with tempfile.TemporaryDirectory() as runs:
        words = (f"data.root={directory}", f"train.global_batch_size={batch}", f"train.max_steps={steps}", *settings)
        more = ("train.epochs=1000", "optim.lr=0.05", f"device={device}", f"run.dir={runs}", "run.name=run")
        more += (f"precision={setting.precision}", f"train.log_every={LOG_EVERY}")
        torchrun(setting.ranks, "-m", "distlenet.train", *words, *more)
        summary = json.loads((Path(runs) / "run/summary.json").read_text())
        lines = map(json.loads, (Path(runs) / "run/metrics.jsonl").read_text().splitlines())
        windows = [record["images_per_s"] for record in lines if record["split"] == "train"]  # of equally many images
        return Figures(statistics.harmonic_mean(windows[1:]), summary["start_s"])


def unpack(directory: Path) -> None:
    """Write Fashion-MNIST uncompressed, in torchvision's layout."""
    raw = directory / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, path in locate_or_download("fashion_mnist", Path("data"), fetch=True).items():
        (raw / name).write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def measure(setting: Setting, rounds: int, peers: tuple[tuple[str, str], ...], directory: Path) -> Rounds:
    """Return the figures of each contestant, by name and round."""
    ours = ON_GPU if setting.device == "cuda" else OURS
    contestants = {
        **{name: (lambda s=settings: run_ours(s, setting, directory)) for name, settings in ours.items()},
        **{f"{p}, {form}": (lambda p=p, f=form: run_peer(p, f, setting, directory)) for p, form in peers},
    }
    figures: Rounds = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        start = number * 3 % len(names)
        for name in names[start:] + names[:start]:
            figures[name].append(contestants[name]())
        print(f"{setting}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return figures


def table(figures: Rounds) -> list[str]:
    """Return a Markdown table of a setting: median, range, and distlenet's ratio to each contestant."""
    lines = [
        "| | images/s | lowest to highest | distlenet is faster by | start |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rounds in figures.items():
        values = [run.images_per_s for run in rounds]
        ratios = [ours.images_per_s / value for ours, value in zip(figures["distlenet"], values, strict=True)]
        ratio = (
            "" if name == "distlenet" else f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        median = statistics.median(values)
        start = statistics.median(run.start_s for run in rounds)
        lines.append(f"| {name} | {median:,.0f} | {min(values):,.0f} to {max(values):,.0f} | {ratio} | {start:.1f} s |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (1 2)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="global batches (64 256 1024)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of all contestants (cpu)")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="fp32, bf16, fp16 (fp32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (5)")
    parser.add_argument("--no-torchvision", action="store_true", help="omit the peers with torchvision's dataset")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    peers = tuple(peer for peer in PEERS if not (arguments.no_torchvision and peer[1] == "torchvision"))
    figures = []
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
        directory = Path(scratch)
        unpack(directory)
        for ranks, batch, precision in product(arguments.ranks, arguments.batches, arguments.precisions):
            setting = Setting(ranks, batch, arguments.device, precision)
            measured = measure(setting, arguments.rounds, peers, directory)
            print("\n".join(["", f"### {setting}", "", *table(measured)]), flush=True)
            speeds = {name: [run.images_per_s for run in runs] for name, runs in measured.items()}
            figures.append({**asdict(setting), "title": str(setting), "images_per_s": speeds})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
