"""``make bench [ARGS="--only throughput recipes"]``: run the benchmarks and write ``benchmarks/RESULTS.md``.

Each section is a program that prints Markdown. Its last output, with machine and date, is kept in
``benchmarks/results/``, so that a single section can be measured again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parent
SECTIONS: dict[str, tuple[str, list[list[str]]]] = {
    "throughput": (
        "Training speed compared with peers",
        [["throughput.py", "--json", str(DIRECTORY / "results/throughput.json")]],
    ),
    "parts": ("Time per part of a step", [["parts.py"]]),
    "reduction": ("Ways to sum gradients", [["reduction_cost.py"]]),
    "networks": ("Other networks, compared with the loop by hand and Lightning", [["networks.py"]]),
    "augmentation": ("Random transforms of a batch", [["augmentation.py"]]),
    "recipes": (
        "Recipes",
        [["recipes.py", "sprint", "--seeds", "5", "--against", "tutorial"], ["recipes.py", "best", "--seeds", "3"]],
    ),
    "wandb": ("Cost of W&B", [["wandb_cost.py", "--within", "--rounds", "3"]]),
    "graph": ("A step on a GPU, counted without one", [["graph_cost.py"]]),
    "images": ("A directory of JPEG images", [["images.py"]]),
    "restarts": ("Restarts of killed ranks", [["restarts.py"]]),
    "size": ("Large datasets: memory and start", [["size.py"]]),
    "exports": ("Exported files", [["exports.py"]]),
    "store": ("Runs in an object store", [["object_store.py", "--every", "1000", "--rounds", "4"]]),
    "serving": ("Predictions over HTTP", [["serving.py"], ["serving_soak.py"]]),
    "growth": ("Large networks: checkpoints, replica check, exact sums", [["growth.py"]]),
    "gpu": (
        "On a GPU",
        [
            ["throughput.py", "--device", "cuda", "--ranks", "1", "--precisions", "fp32", "bf16", "fp16"],
            ["parts.py", "--ranks", "1"],
        ],
    ),
}
DEVICE_SECTIONS = {"cpu": [name for name in SECTIONS if name != "gpu"], "cuda": ["gpu"]}


def machine() -> str:
    """Describe this machine and its software versions in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    parts = [f"{os.cpu_count()} cores ({cpu.strip()})"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "accelerate")]
    return ", ".join(parts)


def commit() -> str:
    """Return the commit of the checkout."""
    described = subprocess.run(
        ["git", "-C", DIRECTORY, "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True, check=True
    )
    return described.stdout.strip()


def measure(section: str) -> None:
    """Run the programs of a section and save their output."""
    title, commands = SECTIONS[section]
    lines = [f"## {title}", "", f"{time.strftime('%Y-%m-%d')}; commit {commit()}; {machine()}"]
    for program, *words in commands:
        print(f"== {program} {' '.join(words)}", file=sys.stderr, flush=True)
        command = [sys.executable, str(DIRECTORY / program), *words]
        shown = " ".join(Path(word).name if "/" in word else word for word in words)
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines += ["", f"`benchmarks/{program} {shown}`".replace(" `", "`"), "", ended.stdout.strip()]
    (DIRECTORY / "results").mkdir(exist_ok=True)
    (DIRECTORY / f"results/{section}.md").write_text("\n".join(lines) + "\n")


def draw(figures: Path, chart: Path) -> None:
    """Draw ``throughput.json``: a panel per setting, a bar for the median of each contestant."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "distlenet"  # the same bytes for the same figures
    from matplotlib import pyplot

    settings = json.loads(figures.read_text())
    figure, panels = pyplot.subplots(1, len(settings), figsize=(5 * len(settings), 3.4), squeeze=False, sharey=True)
    for panel, setting in zip(panels[0], settings, strict=True):
        names = list(setting["images_per_s"])[::-1]
        medians = [statistics.median(setting["images_per_s"][name]) for name in names]
        colors = ["tab:blue" if name.startswith("distlenet") else "tab:gray" for name in names]
        panel.bar_label(panel.barh(names, medians, color=colors), fmt="{:,.0f}", padding=3, fontsize=8)
        panel.set(title=setting["title"], xlabel="images/s of training")
        panel.margins(x=0.18)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(chart, metadata={"Date": None})


def main() -> None:
    """Measure the requested sections, and combine all saved ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SECTIONS,
        help="sections (all for the device); without names: only combine the saved sections",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (cpu)")
    arguments = parser.parse_args()
    for section in DEVICE_SECTIONS[arguments.device] if arguments.only is None else arguments.only:
        measure(section)
    parts = [
        path.read_text() for path in (DIRECTORY / f"results/{section}.md" for section in SECTIONS) if path.exists()
    ]
    if (figures := DIRECTORY / "results/throughput.json").exists():
        draw(figures, DIRECTORY / "results/throughput.svg")
    head = "# Results\n\nWritten by `make bench`. Machines are shared and noisy: read medians and ratios.\n"
    head += "\n![images per second of each contestant](results/throughput.svg)\n"
    (DIRECTORY / "RESULTS.md").write_text("\n".join([head, *parts]))


if __name__ == "__main__":
    main()
