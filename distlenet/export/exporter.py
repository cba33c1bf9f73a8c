"""Export a trained network: write the files, compare them in fresh processes, and publish them as a version."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distlenet.export.export_formats import BUNDLES, NETWORK_FORMATS, require_packages
from distlenet.export.exported_files import write_networks
from distlenet.export.exported_network import (
    IMAGES,
    ExportedNetwork,
    Inputs,
    name_inputs,
)
from distlenet.export.fresh_process import compare_in_fresh_processes
from distlenet.export.int8 import CALIBRATION_BATCH, CALIBRATION_SAMPLES, quantize
from distlenet.export.measured import FileResult, check_int8, check_parity, measure_metrics
from distlenet.export.model_metadata import header_of, image_format, model_json
from distlenet.export.reference import Reference, Single, random_batches, write_reference
from distlenet.export.trained_source import RunData, TrainedSource, load_source
from distlenet.export.triton import check_types
from distlenet.export.version_directory import new_version, sha256_of
from distlenet.export.web import DEFAULT_RUNTIME, check_images, check_runtime
from distlenet.task import Task
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.errors import UserError
from distlenet.utils.exported_model import INT8

SINGLES = 16  # samples that are also computed one by one, because their shapes may differ from those of a batch


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
    if options.split and not formats & {"onnx", "pt2"}:
        raise UserError("--split: no file of --to safetensors is split; add --to onnx or pt2, or remove --split")
    source = load_source(checkpoint, options.weights, options.overrides, options.files)
    if "web" in options.formats:
        check_images(image_format(source))
    task, network = source.trained.task, ExportedNetwork(source.trained.model, source.trained.task).eval()
    _check_predict(task)
    if options.split and not isinstance(task, ImageClassification):
        raise UserError(
            "--split: the task is not an ImageClassification, which has a transform of images; remove --split"
        )
    if options.check == "random" and not isinstance(task, ImageClassification):
        raise UserError("--check random: only the test set of this task shows what it takes; remove --check random")
    data = _load_data(source) if options.check == "test" else None
    with new_version(options.out) as version:
        work = version.path / ".check"
        work.mkdir()
        batches, count, singles = _batches(source, data)
        if "triton" in options.formats:
            batches = _with_types_of_triton(batches)
        reference = write_reference(network, batches, count, singles, work)
        header = header_of(source, options.name, data)
        networks = write_networks(version.path, source, network, formats, reference, options.split, json.dumps(header))
        if options.quantize:
            assert data is not None
            samples = data.training_samples(CALIBRATION_SAMPLES, CALIBRATION_BATCH)
            inputs = (name_inputs(data.task, each) for each in samples)
            quantize(version.path / NETWORK_FORMATS["onnx"], version.path / INT8, inputs)
            networks[INT8] = [version.path / INT8]
        results = compare_in_fresh_processes(work, source, reference, networks)
        if data is not None:
            measure_metrics(data, reference, results)
        check_parity({name: result for name, result in results.items() if name != INT8}, reference)
        if options.quantize:
            check_int8(results[NETWORK_FORMATS["onnx"]], results[INT8], options.max_drop)
        metadata = model_json(header, reference, _describe_files(networks, results, reference), options.check)
        shutil.rmtree(work)
        bundles = [name for name in dict.fromkeys(options.formats) if name in BUNDLES]
        for name in bundles:
            BUNDLES[name](version.path, metadata, options.onnxruntime_web)
        metadata["bundles"] = _describe_bundles(version.path, bundles)
        (version.path / "model.json").write_text(json.dumps(metadata, indent=1) + "\n")
        return Exported(version.publish(), metadata)


def _check_predict(task: Task) -> None:
    """Raise UserError if ``predict`` computes the loss, whose targets are not among the inputs."""
    kind = type(task)
    if kind.predict is Task.predict and kind.export_inputs is Task.export_inputs:
        raise UserError(
            f"{kind.__name__}.predict: the default needs targets, which an exported network does not get; define "
            f"{kind.__name__}.predict, which takes the inputs alone; see docs/own.md"
        )


def _load_data(source: TrainedSource) -> RunData:
    try:
        return RunData(source)
    except UserError as error:
        if not isinstance(source.trained.task, ImageClassification):
            raise
        raise UserError(f"{error}; or give --check random, which compares on random samples") from error


def _with_types_of_triton(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Yield the batches. Raise UserError for an input type that Triton does not have, before the network computes."""
    for inputs in batches:
        check_types({name: str(tensor.dtype).removeprefix("torch.") for name, tensor in inputs.items()})
        yield inputs


def _batches(source: TrainedSource, data: RunData | None) -> tuple[Iterable[Inputs], int, Iterable[Single]]:
    """Return the inputs to compare on, the number of batches, and some samples of them, each alone."""
    if data is not None:
        task = data.task
        batches = (name_inputs(task, each) for each in data.test_batches())
        singles = ((row, name_inputs(task, each)) for row, each in data.single_test_samples(SINGLES))
        return batches, data.batch_count, singles
    images = source.trained.task.images  # type: ignore[attr-defined]
    channels = [] if images.channels == 1 else [images.channels]
    integers = (images.low, images.high) == (0.0, 255.0)
    like = {IMAGES: torch.zeros(1, *channels, *images.size, dtype=torch.uint8 if integers else torch.float32)}
    random = list(random_batches(like, images.low, images.high, [128, 128]))
    return random, 2, ((row, {IMAGES: random[0][IMAGES][row : row + 1]}) for row in range(SINGLES))


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
                **_describe(file),
                **results[name].to_dict(None if name == INT8 else reference.tolerances["outputs"]),
            }
    return entries


def _describe_bundles(version: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of ``bundles`` in model.json: of each file in these directories, by its path."""
    files = sorted(path for name in names for path in (version / name).rglob("*") if path.is_file())
    return {file.relative_to(version).as_posix(): _describe(file) for file in files}


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
