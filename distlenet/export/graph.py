"""The graph of a network, by ``torch.export``, and the files that hold it."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from inspect import Parameter, Signature
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distlenet.utils.errors import UserError, describe_error, one_line

OPSET = 18  # of ONNX: torch's exporter writes it without a conversion
MAX_BYTES = 2**31 - 2**20  # of an ONNX file, whose format has no larger ones
EXPORTER_MODULES = ("torch", "onnxscript", "onnx_ir", "onnxruntime", "copyreg", "onnx")


def trace(network: nn.Module, example: Mapping[str, Tensor], dynamic: Mapping[str, set[int]]) -> ExportedProgram:
    """Return the graph of a network for inputs like ``example``, whose dimensions ``dynamic`` may have other sizes.

    The sizes of those dimensions are at least 2 in the example. Raise UserError if the network cannot be exported.
    """
    shapes = {name: dict.fromkeys(sorted(dimensions), Dim.DYNAMIC) for name, dimensions in dynamic.items()}
    try:
        with quiet(), torch.no_grad(), _named_parameters(network, list(example)):
            program = torch.export.export(network, (), dict(example), dynamic_shapes=shapes)
    except UserError:
        raise
    except Exception as error:  # of the user's code or of torch
        reason = describe_error(error, 500)
        raise UserError(
            f"export: torch.export cannot trace the network: {reason}; in predict and forward, branch on no value of a "
            "tensor, and write x.shape[0] for the number of samples, not len(x)"
        ) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains the paths of this machine
    return program


@contextmanager
def _named_parameters(network: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give the method ``forward(**inputs)`` parameters with these names: not all versions can export the other form."""
    forward = network.forward
    signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def named(*args: Tensor, **kwargs: Tensor) -> Mapping[str, Tensor]:
        outputs: Mapping[str, Tensor] = forward(**signature.bind(*args, **kwargs).arguments)
        return outputs

    named.__signature__ = signature  # type: ignore[attr-defined]
    network.forward = named
    try:
        yield
    finally:
        del network.forward


def write_pt2(program: ExportedProgram, file: Path, metadata: str) -> None:
    """Write the graph for ``torch.export.load``."""
    content = io.BytesIO()  # PyTorch's writer aborts the process if the disk is full
    with quiet():
        torch.export.save(program, content, extra_files={"metadata.json": metadata})
    file.write_bytes(content.getbuffer())


def write_onnx(program: ExportedProgram, file: Path, metadata: str, outputs: tuple[str, ...]) -> None:
    """Write the graph as ONNX, with names of inputs and outputs. Raise UserError if that is not possible."""
    import onnx

    inputs = list(program.graph_signature.user_inputs)
    try:
        with quiet(), redirect_stdout(io.StringIO()):
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=list(outputs),
                verbose=False,
                optimize=not _has_tied_weights(program),
            )
        assert converted is not None
        model = converted.model_proto
        size = model.ByteSize()
    except Exception as error:
        reason = describe_error(error, 500)
        raise UserError(
            f"export: {file.name}: torch.onnx cannot convert the network: {reason}; use --to pt2"
        ) from error
    if size > MAX_BYTES:
        raise UserError(f"export: {file.name}: has {size / 2**30:.1f} GiB, an ONNX file at most 2; use --to pt2")
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]  # contains the paths of this machine
        for value in graph.value_info:
            del value.metadata_props[:]
    onnx.helper.set_model_props(model, {"distlenet": metadata})
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # its classes have no common one
        reason = one_line(error, 500)
        raise UserError(f"export: {file.name}: torch.onnx wrote an invalid file: {reason}; use --to pt2") from error
    file.write_bytes(model.SerializeToString())


def _has_tied_weights(program: ExportedProgram) -> bool:
    """Return whether two names have one tensor: up to 0.6, onnxscript fuses a BatchNorm into all uses of a weight."""
    addresses = [tensor.data_ptr() for tensor in program.state_dict.values() if tensor.numel()]
    return len(set(addresses)) < len(addresses)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress and the deprecations of the exporters; warnings of other modules are shown."""
    loggers = [logging.getLogger(name) for name in EXPORTER_MODULES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for name in EXPORTER_MODULES:
                warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
