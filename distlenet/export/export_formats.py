"""The formats that ``--to`` names."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distlenet.export.triton import write_triton
from distlenet.export.web import write_web
from distlenet.utils.errors import UserError

NETWORK_FORMATS = {"pt2": "model.pt2", "onnx": "model.onnx", "safetensors": "model.safetensors"}
"""The files that hold the network, which are compared with it."""

BUNDLES: dict[str, Callable[[Path, dict[str, Any], Path], None]] = {
    "triton": lambda version_dir, metadata, _: write_triton(version_dir, metadata),
    "web": write_web,
}
"""What is written from model.onnx after the comparison: functions of the version's directory, of model.json, and of the
directory of ONNX Runtime Web."""

PACKAGES = {
    "pt2": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "safetensors": ("safetensors",),
}


def require_packages(formats: set[str]) -> None:
    """Raise UserError if a package that one of the formats needs is not installed."""
    for name in sorted({name for each in formats for name in PACKAGES[each]}):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name}: not installed; pip install 'distlenet[export]'") from error
