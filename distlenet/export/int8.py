"""A network in 8-bit integers, by the static quantization of ONNX Runtime."""

import io
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from distlenet.export.exported_network import Inputs
from distlenet.export.graph import quiet
from distlenet.utils.errors import UserError, describe_error

CALIBRATION_SAMPLES, CALIBRATION_BATCH = 1024, 64
QUANTIZED = [
    *("Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Concat", "Gather"),
]
"""Not the transform, whose values are exact, and not the softmax: its results would be multiples of 1/256."""


def quantize(source: Path, target: Path, calibration: Iterable[Inputs]) -> None:
    """Write an ONNX file with 8-bit weights and activations, whose ranges are those of the ``calibration`` samples.

    Weights are int8 per channel, of 7 bits: without them, the 16-bit sums of processors without VNNI saturate, and the
    results would depend on the processor. The outputs of linear layers stay float32: no two logits become equal.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Inputs] = iter(calibration)

        def get_next(self) -> Any:
            inputs = next(self.batches, None)
            return None if inputs is None else {name: tensor.numpy() for name, tensor in inputs.items()}

    prepared = target.with_suffix(".prepared")
    try:
        with quiet(), redirect_stdout(io.StringIO()):
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTIZED,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
            )
    except (UserError, OSError):  # of the data, of the disk
        raise
    except Exception as error:
        reason = describe_error(error, 500)
        raise UserError(f"--quantize int8: ONNX Runtime cannot quantize the network: {reason}; remove it") from error
    finally:
        prepared.unlink(missing_ok=True)
