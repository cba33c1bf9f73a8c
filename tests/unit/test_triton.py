"""The model repository for Triton, read by the protobuf definition of Triton's client."""

import importlib.util
import os
from pathlib import Path

import pytest
import tritonclient

from distlenet.export.triton import TYPES, write_triton
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

PREDICTIONS = {"dtype": "float32", "shape": [None, 3]}
METADATA = {
    "name": "shapes-1.0",
    "inputs": {"images": {"dtype": "uint8", "shape": [None, 3, None, None]}},
    "outputs": {"outputs": PREDICTIONS, "predictions": PREDICTIONS},
    "classes": ["round", "T-shirt\t/ top", "Größe"],
}


def model_config():
    """Load the definition without the gRPC client next to it, which needs grpcio."""
    path = Path(tritonclient.__path__[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # ImportError, or VersionError of protobuf
        pytest.skip(f"this protobuf is too old for tritonclient: {error}", allow_module_level=True)
    return module


DEFINITION = model_config()


def read_config(model):
    """Return config.pbtxt as Triton reads it; an unknown or misspelled field is an error."""
    from google.protobuf import text_format

    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), DEFINITION.ModelConfig())


def write(directory, **changes):
    (directory / "model.onnx").write_bytes(b"a network")
    write_triton(directory, METADATA | changes)
    (model,) = (directory / "triton").iterdir()
    return model, read_config(model)


def test_the_repository_has_the_network_with_its_inputs_and_outputs(tmp_path):
    model, config = write(tmp_path)
    assert (model.name, config.name, config.platform) == ("shapes-1.0", "shapes-1.0", "onnxruntime_onnx")
    assert (model / "1/model.onnx").samefile(tmp_path / "model.onnx")
    assert {path.name for path in model.iterdir()} == {"1", "config.pbtxt", "labels.txt"}
    tensors = [(each.name, each.data_type, list(each.dims)) for each in [*config.input, *config.output]]
    assert tensors == [
        ("images", DEFINITION.TYPE_UINT8, [3, -1, -1]),
        ("outputs", DEFINITION.TYPE_FP32, [3]),
        ("predictions", DEFINITION.TYPE_FP32, [3]),
    ]


def test_requests_are_batched_up_to_the_largest_batch(tmp_path):
    _, config = write(tmp_path)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert max(config.dynamic_batching.preferred_batch_size) == config.max_batch_size == 64  # no larger one is allowed
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert not config.instance_group  # chosen by Triton


def test_the_classes_are_the_labels_of_the_predictions(tmp_path):
    model, config = write(tmp_path)
    assert [output.label_filename for output in config.output] == ["", "labels.txt"]
    assert (model / "labels.txt").read_text(encoding="utf-8").splitlines() == ["round", "T-shirt / top", "Größe"]


def test_a_model_without_classes_has_no_labels(tmp_path):
    for number, classes in enumerate((None, ["one", "two"])):  # two names, but three values
        (tmp_path / str(number)).mkdir()
        model, config = write(tmp_path / str(number), classes=classes)
        assert {path.name for path in model.iterdir()} == {"1", "config.pbtxt"}
        assert not any(output.label_filename for output in config.output)


def test_one_number_per_sample_is_reshaped(tmp_path):
    """Triton refuses empty dims."""
    score = {"dtype": "float16", "shape": [None]}
    _, config = write(tmp_path, outputs={"outputs": score, "predictions": score}, classes=None)
    for output in config.output:
        assert (list(output.dims), list(output.reshape.shape), output.HasField("reshape")) == ([1], [], True)
        assert output.data_type == DEFINITION.TYPE_FP16


def test_every_type_is_one_of_triton():
    assert set(TYPES.values()) == set(DEFINITION.DataType.keys()) - {"TYPE_INVALID", "TYPE_STRING"}


def test_another_type_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--to triton: input codes: Triton has no type complex64; export another type"):
        write(tmp_path, inputs={"codes": {"dtype": "complex64", "shape": [None]}})


def test_without_hard_links_the_network_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    model, _ = write(tmp_path)
    assert (model / "1/model.onnx").read_bytes() == b"a network"
    assert not (model / "1/model.onnx").samefile(tmp_path / "model.onnx")
