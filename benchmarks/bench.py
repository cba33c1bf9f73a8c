"""``make bench [ARGS="--only throughput recipes"]``: run the benchmarks, and write ``benchmarks/RESULTS.md``.

Each section is a program that prints Markdown; what it printed last, with machine and date, is kept in
``benchmarks/results/``, so that one section can be measured anew alone.
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

HERE = Path(__file__).parent
SECTIONS: dict[str, tuple[str, list[list[str]]]] = {
    "throughput": ("Training speed beside peers", [["throughput.py", "--json", str(HERE / "results/throughput.json")]]),
    "parts": ("Where a step's time goes", [["parts.py"]]),
    "reduction": ("Ways of adding gradients", [["reduction_cost.py"]]),
    "recipes": (
        "Recipes",
        [["recipes.py", "sprint", "--seeds", "5", "--against", "tutorial"], ["recipes.py", "best", "--seeds", "3"]],
    ),
    "wandb": ("What W&B costs the training", [["wandb_cost.py", "--within", "--rounds", "3"]]),
    "size": ("Large sets: memory and start", [["size.py"]]),
    "gpu": (
        "On a GPU",
        [
            ["throughput.py", "--device", "cuda", "--ranks", "1", "--precisions", "fp32", "bf16", "fp16"],
            ["parts.py", "--ranks", "1"],
        ],
    ),
}
OF_DEVICE = {"cpu": [name for name in SECTIONS if name != "gpu"], "cuda": ["gpu"]}


def machine() -> str:
    """Describe this machine and the versions on it, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    parts = [f"{os.cpu_count()} cores ({cpu.strip()})"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning", "accelerate")]
    return ", ".join(parts)


def measure(section: str) -> None:
    """Run a section's programs and keep what they print."""
    title, commands = SECTIONS[section]
    lines = [f"## {title}", "", f"{time.strftime('%Y-%m-%d')}; {machine()}"]
    for program, *words in commands:
        print(f"== {program} {' '.join(words)}", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / program), *words]
        shown = " ".join(Path(word).name if "/" in word else word for word in words)
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        lines += ["", f"`benchmarks/{program} {shown}`".replace(" `", "`"), "", ended.stdout.strip()]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / f"results/{section}.md").write_text("\n".join(lines) + "\n")


def draw(figures: Path, picture: Path) -> None:
    """Draw the speeds of ``throughput.json``: a panel for each setting, a bar for each contestant's median."""
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
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    """Measure the sections asked for, and put all that are there together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SECTIONS,
        help="sections (all that are for the device); none: only put together what is there",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure (cpu)")
    arguments = parser.parse_args()
    for section in OF_DEVICE[arguments.device] if arguments.only is None else arguments.only:
        measure(section)
    parts = [path.read_text() for path in (HERE / f"results/{section}.md" for section in SECTIONS) if path.exists()]
    if (figures := HERE / "results/throughput.json").exists():
        draw(figures, HERE / "results/throughput.svg")
    head = "# Results\n\nWritten by `make bench`. Machines are shared and noisy: read medians and ratios.\n"
    head += "\n![images per second of each contestant](results/throughput.svg)\n"
    (HERE / "RESULTS.md").write_text("\n".join([head, *parts]))


if __name__ == "__main__":
    main()
