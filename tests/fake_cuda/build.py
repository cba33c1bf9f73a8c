"""Compile the runtime, once for each version of its sources."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "runtime"
LIBRARY = "libcuda.so.1"  # also its soname: PyTorch's library for the driver links it, and finds the preloaded one
OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden")


def why_not() -> str | None:
    """Return why this machine cannot have the fake, or None."""
    if torch.version.cuda is None:
        return "PyTorch is not a CUDA build"
    if shutil.which("g++") is None:
        return "no g++"
    return None if _toolkit() else "no headers of the CUDA runtime next to PyTorch"


def _toolkit() -> Path | None:
    """Return the directory of the CUDA runtime's headers, which PyTorch's wheels for CUDA depend on."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for header in sorted(Path(root).glob("*/include/cuda_runtime_api.h")):
            return header.parent
    return None


def library() -> Path:
    """Return the compiled runtime, from the cache if it is there."""
    headers = _toolkit()
    assert headers is not None, why_not()
    files = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    content = b"".join(path.read_bytes() for path in files) + str((headers, OPTIONS)).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    directory = Path(tempfile.gettempdir()) / f"distlenet-fake-cuda-{os.getuid()}-{digest}"
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as work:
                _compile(headers, Path(work))
                (Path(work) / "done").mkdir()
                shutil.move(Path(work) / LIBRARY, Path(work) / "done")
                (Path(work) / "done").rename(directory)
    return directory / LIBRARY


def _compile(headers: Path, work: Path) -> None:
    def compile_file(source: Path) -> Path:
        target = work / f"{source.stem}.o"
        includes = ("-I", SOURCES / "include", "-isystem", headers)
        subprocess.run(["g++", *OPTIONS, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, sorted(SOURCES.glob("*.cpp"))))
    subprocess.run(
        ["g++", "-shared", f"-Wl,-soname,{LIBRARY}", *objects, "-o", work / LIBRARY, "-lpthread"], check=True
    )
