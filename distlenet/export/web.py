"""A directory for any static host: the page, the network, and ONNX Runtime Web to run it in the browser."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from distlenet.utils.errors import UserError

PAGE = Path(__file__).parent.parent / "page"
DEFAULT_RUNTIME = Path("node_modules/onnxruntime-web")
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
"""What the page loads of the npm package: for WebAssembly on one thread, without WebGPU."""
OLDEST = (1, 23)
FIX = "run npm install onnxruntime-web, or give --onnxruntime-web DIR"
SETTINGS = {"backend": "web", "model": "model.onnx", "metadata": "model.json", "runtime": "ort/"}


def check_runtime(runtime: Path) -> None:
    """Raise UserError unless the directory is an installed npm package onnxruntime-web that the page can use."""
    try:
        package = json.loads((runtime / "package.json").read_text())
        name, version = package["name"], package["version"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--to web: {runtime} is not the npm package onnxruntime-web: {FIX}") from error
    match = re.match(r"(\d{1,9})\.(\d{1,9})\.", str(version))
    if name != "onnxruntime-web" or match is None:
        raise UserError(f"--to web: {runtime} is not the npm package onnxruntime-web: {FIX}")
    if (int(match[1]), int(match[2])) < OLDEST:
        expected = ".".join(map(str, OLDEST))
        raise UserError(f"--to web: {runtime} is version {version}, expected {expected} or later: {FIX}")
    for file in RUNTIME_FILES:
        if not (runtime / "dist" / file).is_file():
            raise UserError(f"--to web: {runtime}: version {version} has no file dist/{file}: {FIX}")


def check_images(images: dict[str, Any] | None) -> None:
    """Raise UserError if the model has no format of images."""
    if images is None:
        raise UserError("--to web: the page reads image files, and this model reads none: remove web from --to")


def write_web(version_dir: Path, metadata: dict[str, Any], runtime: Path) -> None:
    """Write ``version_dir/web``: the page with ``model.onnx`` of the version, its metadata, and the ``runtime``.

    ``runtime`` is the directory of the npm package onnxruntime-web. Raise UserError if it is missing, or if the model
    reads no image files.
    """
    check_images(metadata["images"])
    check_runtime(runtime)
    web = version_dir / "web"
    shutil.copytree(PAGE, web, copy_function=shutil.copyfile)
    (web / "page.json").write_text(json.dumps(SETTINGS) + "\n")
    shutil.copyfile(version_dir / "model.onnx", web / "model.onnx")
    (web / "model.json").write_text(json.dumps(metadata, indent=1) + "\n")
    (web / "ort").mkdir()
    for file in RUNTIME_FILES:
        shutil.copyfile(runtime / "dist" / file, web / "ort" / file)
