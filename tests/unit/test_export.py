"""Exported files compute what the network computes; a file that does not, or a killed export, leaves nothing."""

import hashlib
import json

import pytest
from forked import run_python

pytestmark = [pytest.mark.unit, pytest.mark.slow]

SAMPLES = 360  # of the test set of digits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on the bundled digits."""
    directory = tmp_path_factory.mktemp("export")
    settings = ("data.name=digits", "train.epochs=4", "optim.lr=0.05", f"run.dir={directory}", "run.name=run")
    run_python("-m", "distlenet.train", *settings).succeeded()
    return directory


@pytest.fixture(scope="module")
def exported(run):
    """All formats, and what was printed."""
    words = ("--to", "pt2", "onnx", "safetensors", "triton", "--split", "--quantize", "int8", "--max-drop", "5")
    ended = run_python("-m", "distlenet.export", run / "run", *words, "--out", run / "model").succeeded()
    return ended, json.loads((run / "model/1/model.json").read_text())


def test_each_file_gives_the_classes_of_the_network_over_the_whole_test_set(run, exported):
    files = exported[1]["files"]
    names = {f"{part}.{suffix}" for part in ("model", "transform", "network") for suffix in ("onnx", "pt2")}
    assert files.keys() == names | {"model.safetensors", "model.int8.onnx"}
    for name in files.keys() - {"model.int8.onnx"}:
        entry = files[name]
        assert (entry["samples"], entry["same_classes"] + entry["close"]) == (SAMPLES, SAMPLES)
        assert entry["largest_difference"] <= entry["tolerance"] < 1e-4
    assert exported[1]["format"] == 1


def test_the_files_are_those_that_were_checked(run, exported):
    version = run / "model/1"
    for name, entry in exported[1]["files"].items():
        content = (version / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert {path.name for path in version.iterdir()} == {*exported[1]["files"], "model.json", "triton"}
    assert [path.name for path in (run / "model").iterdir()] == ["1"]


def test_nothing_but_the_table_is_printed(exported):
    ended, metadata = exported
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["file", *metadata["files"], "Version:"]


def test_triton_gets_the_network_as_it_is(run, exported):
    import onnxruntime
    from test_triton import read_config

    model = run / "model/1/triton/run"
    config, session = read_config(model), onnxruntime.InferenceSession(model / "1/model.onnx")
    for given, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in given] == [tensor.name for tensor in found]
        assert [list(tensor.dims) for tensor in given] == [tensor.shape[1:] for tensor in found]
        assert all(isinstance(tensor.shape[0], str) for tensor in found)  # any number of samples
