"""A model repository for NVIDIA Triton Inference Server.

Source: https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlenet.utils.errors import UserError

MAX_BATCH_SIZE = 64
PREFERRED_BATCH_SIZES = (16, 32, 64)
MAX_QUEUE_DELAY_US = 2000  # that a request waits for others
TYPES = {
    **{f"{kind}{bits}": f"TYPE_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "bool": "TYPE_BOOL",
}

CONFIG = """\
# Triton Inference Server, backend ONNX Runtime. Dimension 0 is the sample, which dims do not have.
name: {name}
platform: "onnxruntime_onnx"
max_batch_size: {max_batch_size}
{tensors}
# Requests that arrive together are computed together.
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {delay}
}}
# Where the network runs: without this, one instance on each GPU, or on the CPU if there is none.
# instance_group [ {{ count: 2 kind: KIND_GPU gpus: [ 0 ] }} ]
# instance_group [ {{ count: 1 kind: KIND_CPU }} ]
"""


def write_triton(version_dir: Path, metadata: dict[str, Any]) -> None:
    """Write ``version_dir/triton``: a repository with one model, ``model.onnx`` of the version.

    ``metadata`` is the content of model.json. Raise UserError if Triton has no such type.
    """
    model = version_dir / "triton" / metadata["name"]
    (model / "1").mkdir(parents=True)
    _link(version_dir / "model.onnx", model / "1" / "model.onnx")
    classes = metadata["classes"]
    labelled = classes is not None and metadata["outputs"]["predictions"]["shape"][1:] == [len(classes)]
    if labelled:
        (model / "labels.txt").write_text("".join(" ".join(name.split()) + "\n" for name in classes), encoding="utf-8")
    tensors = [_tensor("input", name, tensor) for name, tensor in metadata["inputs"].items()]
    for name, tensor in metadata["outputs"].items():
        tensors.append(_tensor("output", name, tensor, labelled and name == "predictions"))
    config = CONFIG.format(
        name=_quote(metadata["name"]),
        max_batch_size=MAX_BATCH_SIZE,
        tensors="\n".join(tensors),
        preferred=", ".join(map(str, PREFERRED_BATCH_SIZES)),
        delay=MAX_QUEUE_DELAY_US,
    )
    (model / "config.pbtxt").write_text(config, encoding="utf-8")


def check_types(dtypes: Mapping[str, str]) -> None:
    """Raise UserError if Triton has not the type of an input, given by names."""
    for name, dtype in dtypes.items():
        _type("input", name, dtype)


def _type(kind: str, name: str, dtype: str) -> str:
    if dtype not in TYPES:
        raise UserError(f"--to triton: {kind} {name}: Triton has no type {dtype}; export another type")
    return TYPES[dtype]


def _tensor(kind: str, name: str, tensor: dict[str, Any], labelled: bool = False) -> str:
    """Return the description of an input or output, without the dimension of the sample."""
    dims = ", ".join("-1" if size is None else str(size) for size in tensor["shape"][1:])
    shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"  # one number per sample
    labels = ' label_filename: "labels.txt"' * labelled
    return f"{kind} [ {{ name: {_quote(name)} data_type: {_type(kind, name, tensor['dtype'])} {shape}{labels} }} ]"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on a file system that has none."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
