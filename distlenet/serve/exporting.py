"""Export a run to a temporary directory, in a child process: only the export needs PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from distlenet.utils.errors import UserError, warn
from distlenet.utils.process import exit_with_parent
from distlenet.utils.version_names import version_of

PACKAGES = ("torch", "onnx", "onnxscript")


def is_model(path: Path) -> bool:
    """Return whether a path is a directory of versions, or one version. Raise UserError if it cannot be read."""
    try:
        if (path / "model.json").is_file():
            return True
        return path.is_dir() and any(version_of(child.name) is not None and child.is_dir() for child in path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def export_run(run: str, out: Path, quantize: bool) -> None:
    """Export a run or a checkpoint file to the directory ``out``. Raise UserError if that fails."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{run}: is not an exported model, and an export needs {', '.join(missing)}; install them with "
            "pip install 'distlenet[export]', or export elsewhere: python -m distlenet.export RUN --to onnx --out DIR"
        )
    command = [sys.executable, "-m", "distlenet.export", run, "--to", "onnx", "--out", str(out)]
    command += ["--quantize", "int8"] if quantize else ["--check", "random"]  # int8 needs the data anyway
    warn(f"exporting {run} to a temporary directory")
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, preexec_fn=exit_with_parent)
    if ended.returncode:
        raise UserError(
            f"{run}: the export failed with status {ended.returncode}; its message is above. Export a run of your own "
            "task or network first: distlenet export RUN task.name=... or model.name=... --to onnx --out DIR, then "
            "distlenet serve DIR"
        )
