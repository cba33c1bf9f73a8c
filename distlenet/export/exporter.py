"""Export a trained network: write the files, compare them in fresh processes, and publish them as a version."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlenet.export.export_formats import BUNDLES, NETWORK_FORMATS, require_packages
from distlenet.export.exported_network import (
    OUTPUTS,
    TRANSFORMED,
    ExportedNetwork,
    Inputs,
    NetworkOnly,
    TransformOnly,
    name_inputs,
)
from distlenet.export.graph import trace, write_onnx, write_pt2
from distlenet.export.int8 import CALIBRATION_SAMPLES, TOGETHER, quantize
from distlenet.export.measured import FileResult, check_int8, check_parity, measure_metrics
from distlenet.export.model_metadata import header_of, model_json
from distlenet.export.reference import Reference, random_batches, write_reference
from distlenet.export.trained_source import RunData, TrainedSource, load_source
from distlenet.export.version_directory import new_version, sha256_of
from distlenet.export.web import DEFAULT_RUNTIME, check_runtime
from distlenet.export.weight_file import write_weights
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.errors import UserError

INT8 = "model.int8.onnx"
TORCH_FREE = ".onnx"


@dataclass(frozen=True)
class ExportOptions:
    """What the command line selects."""

    formats: Sequence[str]
    out: Path
    weights: str | None = None
    quantize: bool = False
    split: bool = False
    name: str | None = None
    check: str = "test"  # or random
    max_drop: float = 0.5  # percentage points
    overrides: Sequence[str] = ()
    files: Sequence[str] = ()
    onnxruntime_web: Path = DEFAULT_RUNTIME


@dataclass(frozen=True)
class Exported:
    """A version that was written."""

    path: Path
    metadata: dict[str, Any]


def export(checkpoint: str, options: ExportOptions) -> Exported:
    """Export a run or a checkpoint file to a new version of the model ``options.out``.

    Raise UserError if anything fails, also if a file does not compute what the network computes: then nothing is
    written.
    """
    formats = set(options.formats) & NETWORK_FORMATS.keys()
    if options.quantize or set(options.formats) & BUNDLES.keys():
        formats.add("onnx")
    require_packages(formats)
    if "web" in options.formats:
        check_runtime(options.onnxruntime_web)
    if options.quantize and options.check == "random":
        raise UserError("--quantize int8: needs the data, for the calibration and the accuracy; remove --check random")
    source = load_source(checkpoint, options.weights, options.overrides, options.files)
    task, network = source.trained.task, ExportedNetwork(source.trained.model, source.trained.task).eval()
    if options.split and not isinstance(task, ImageClassification):
        raise UserError("--split: the task is no ImageClassification, which has a transform of images; remove --split")
    data = _load_data(source) if options.check == "test" or not isinstance(task, ImageClassification) else None
    with new_version(options.out) as version:
        work = version.path / ".check"
        work.mkdir()
        batches, count = _batches(source, data, options.check)
        reference = write_reference(network, batches, count, work)
        header = header_of(source, options, data)
        networks = _write_files(version.path, source, network, formats, reference, options.split, json.dumps(header))
        if options.quantize:
            assert data is not None
            samples = (name_inputs(data.task, each) for each in data.training_samples(CALIBRATION_SAMPLES, TOGETHER))
            quantize(version.path / NETWORK_FORMATS["onnx"], version.path / INT8, samples)
            networks[INT8] = [version.path / INT8]
        results = _compare(work, source, reference, networks)
        if data is not None and options.check == "test":
            measure_metrics(data, reference, results)
        check_parity({name: result for name, result in results.items() if name != INT8}, reference)
        if options.quantize:
            check_int8(results[NETWORK_FORMATS["onnx"]], results[INT8], options.max_drop)
        metadata = model_json(header, reference, _describe_files(networks, results, reference), options.check)
        _remove(work)
        (version.path / "model.json").write_text(json.dumps(metadata, indent=1) + "\n")
        for name in options.formats:
            if name in BUNDLES:
                BUNDLES[name](version.path, metadata, options.onnxruntime_web)
        return Exported(version.publish(), metadata)


def _load_data(source: TrainedSource) -> RunData:
    try:
        return RunData(source)
    except UserError as error:
        raise UserError(
            f"{error}; or give --check random: then the files are compared on random samples, if the task is an "
            "ImageClassification"
        ) from error


def _batches(source: TrainedSource, data: RunData | None, check: str) -> tuple[Iterable[Inputs], int]:
    """Return the inputs to compare on, and the number of batches."""
    if data is not None and check == "test":
        task, batches = data.task, data.test_batches()
        return (name_inputs(task, each) for each in batches), data.batch_count
    if data is not None:
        raise UserError("--check random: the task is no ImageClassification, so only its test set shows what it takes")
    images = source.trained.task.images  # type: ignore[attr-defined]
    channels = [] if images.channels == 1 else [images.channels]
    integers = (images.low, images.high) == (0.0, 255.0)
    like = {"images": torch.zeros(1, *channels, *images.size, dtype=torch.uint8 if integers else torch.float32)}
    return random_batches(like, images.high, images.low)(), 2


def _write_files(
    directory: Path,
    source: TrainedSource,
    network: ExportedNetwork,
    formats: set[str],
    reference: Reference,
    split: bool,
    header: str,
) -> dict[str, list[Path]]:
    """Write the files of all formats; return the files of each network that is compared."""
    networks = {}
    if "safetensors" in formats:
        file = directory / NETWORK_FORMATS["safetensors"]
        write_weights(source.trained.model, file, {"distlenet": header})
        networks[file.name] = [file]
    graphs: dict[str, tuple[torch.nn.Module, Inputs, dict[str, set[int]], tuple[str, ...]]] = {
        "model": (network, reference.example, reference.dynamic(), OUTPUTS)
    }
    if split:
        task = source.trained.task
        assert isinstance(task, ImageClassification)
        transform = TransformOnly(task).eval()
        with torch.no_grad():
            transformed = transform(**reference.example)
        graphs["transform"] = (transform, reference.example, reference.dynamic(), (TRANSFORMED,))
        graphs["network"] = (
            NetworkOnly(source.trained.model, task).eval(),
            transformed,
            {TRANSFORMED: {0}},
            OUTPUTS,
        )
    for suffix in sorted({"pt2", "onnx"} & formats):
        for name, (module, example, dynamic, outputs) in graphs.items():
            file = directory / f"{name}.{suffix}"
            # Traced for each format: torch.onnx changes the graph that it converts.
            program = trace(module, example, dynamic)
            if suffix == "pt2":
                write_pt2(program, file, header)
            else:
                write_onnx(program, file, header, outputs)
            if name != "transform":
                networks[file.name] = [file] if name == "model" else [directory / f"transform.{suffix}", file]
    return networks


def _compare(
    work: Path, source: TrainedSource, reference: Reference, networks: dict[str, list[Path]]
) -> dict[str, FileResult]:
    """Run all files in fresh processes, those that need no PyTorch in one without it."""
    results: dict[str, FileResult] = {}
    groups: list[Callable[[str], bool]] = [lambda name: name.endswith(TORCH_FREE), lambda n: not n.endswith(TORCH_FREE)]
    for belongs in groups:
        group = {name: [str(file) for file in files] for name, files in networks.items() if belongs(name)}
        if not group:
            continue
        job = {
            "parts": reference.parts,
            "inputs": list(reference.example),
            "outputs": list(OUTPUTS),
            "tolerances": reference.tolerances,
            "networks": group,
            "network": {
                "path": str(source.file),
                "overrides": list(source.overrides),
                "files": list(source.files),
            },
        }
        (work / "job.json").write_text(json.dumps(job))
        command = [sys.executable, "-m", "distlenet.export.parity", str(work)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            reason = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1][:500]
            raise UserError(f"export: {', '.join(group)}: cannot be loaded and run: {reason}; nothing is written")
        results |= {name: FileResult(**each) for name, each in json.loads((work / "results.json").read_text()).items()}
    return results


def _describe_files(
    networks: dict[str, list[Path]],
    results: dict[str, FileResult],
    reference: Reference,
) -> dict[str, dict[str, Any]]:
    """Return the entries of ``files`` in model.json: of each file, the result of the last network that contains it."""
    entries = {}
    for name, files in networks.items():
        for file in files:
            entries[file.name] = {
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
                **results[name].to_dict(None if name == INT8 else reference.tolerances["outputs"]),
            }
    return entries


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
