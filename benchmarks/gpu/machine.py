"""The machine, its software versions, and what is missing."""

import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu.questions import REPO, environment

NOT_NEEDED = {"wandb"}  # with WANDB_MODE=disabled
LEAST_TORCH = "2.11"
QUERY = """
from pathlib import Path
import torch
from distlenet.data.download import locate_or_download
torch.cuda.init()
locate_or_download("fashion_mnist", Path("data"), fetch=False)
print("GPU:", torch.cuda.get_device_name())
print("CUDA:", torch.version.cuda)
print("cuDNN:", torch.backends.cudnn.version())
print("NCCL:", ".".join(map(str, torch.cuda.nccl.version())))
"""


def missing(declared: Iterable[str]) -> list[str]:
    """Return the requirements, such as ``omegaconf>=2.4``, that are not installed or too old."""
    found = []
    for requirement in declared:
        name, _, least = requirement.partition(">=")
        if name in NOT_NEEDED:
            continue
        try:
            if numbers(version(name)) < numbers(least):
                found.append(f"{requirement} (found {version(name)})")
        except PackageNotFoundError:
            found.append(requirement)
    return found


def declared_dependencies() -> list[str]:
    """Return what pyproject.toml declares, with the PyTorch that the report needs."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    others = [text for text in project["dependencies"] if not text.startswith("torch>=")]
    return [f"torch>={LEAST_TORCH}", *others]


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def facts(command: list[str]) -> list[tuple[str, str]]:
    """Return the lines of the page's first table. Raise RuntimeError without a GPU or the data."""
    ended = subprocess.run([sys.executable, "-c", QUERY], cwd=REPO, env=environment(), capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    gpu = [(name, value) for name, _, value in (line.partition(": ") for line in ended.stdout.splitlines())]
    names = ("torch", "torchvision", "lightning")
    return [
        *gpu,
        ("driver", driver()),
        ("machine", f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"),
        ("packages", ", ".join(f"{name} {installed(name)}" for name in names)),
        ("commit", commit()),
        ("date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
        ("command", " ".join(command)),
    ]


def driver() -> str:
    """Return the version of the driver, as the kernel or nvidia-smi reports it."""
    module = Path("/proc/driver/nvidia/version")
    if module.exists():
        return module.read_text().splitlines()[0].partition(": ")[2].strip()
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str:
    """Return the commit of the checkout, or of the bundle that was made from it."""
    bundled = REPO / ".wheels/COMMIT"
    described = output("git", "-C", str(REPO), "describe", "--always", "--dirty", "--abbrev=12")
    return bundled.read_text().strip() if described == "unknown" and bundled.exists() else described


def output(*command: str) -> str:
    """Return the first line that a command prints, or ``unknown``."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ended.stdout.strip().splitlines()[0] if not ended.returncode and ended.stdout.strip() else "unknown"


def installed(name: str) -> str:
    """Return the version of a package, or ``not installed``."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
