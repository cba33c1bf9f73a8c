"""Exported files compute what the network computes; a file that does not, or a killed export, leaves nothing."""

import hashlib
import json
import re
import subprocess

import pytest
import torch
from conftest import REPO
from forked import run_python
from PIL import Image
from serve_models import serving

from distlenet.config.loading import load_config
from distlenet.data.sources import load_images

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


COUNT, DIGITS = 3, 10
URL = "http://127.0.0.1:8000"
LINE = re.compile(r"^curl .*?(?=\s+#|$)", re.MULTILINE)
PAGES = (REPO / "README.md", REPO / "docs/serving.md")


@pytest.fixture(scope="module")
def place(run, exported):
    """A directory with the files that docs/serving.md names, and the images of the test set in them."""
    images = load_images(load_config([], ["data.name=digits"]).data).test.get_batch(torch.arange(COUNT))[0].numpy()
    place = run / "place"
    place.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(place / f"{number}.png")
    (place / "0.png").rename(place / "shoe.png")
    (place / "token").write_text("secret\n")
    (place / "instances.json").write_text(json.dumps({"instances": images[:1].tolist()}))
    tensor = {
        "name": "images",
        "shape": [1, *images.shape[1:]],
        "datatype": "UINT8",
        "data": images[0].ravel().tolist(),
    }
    (place / "tensors.json").write_text(json.dumps({"inputs": [tensor]}))
    return place, images


@pytest.fixture(scope="module")
def predicted(run, place):
    """What ``distlenet predict --json`` prints for these images."""
    files = [place[0] / name for name in ("shoe.png", "1.png", "2.png")]
    command = ("-m", "distlenet.predict", f"checkpoint={run / 'run'}", *files, "--json", "--top", DIGITS)
    return [json.loads(line)["top"] for line in run_python(*command).succeeded().stdout.splitlines()]


@pytest.fixture(scope="module")
def servers(run, place):
    """The address of the exported model, and that of a server with a token."""
    words = (run / "model", "--name", "fashion")
    with serving(*words) as server, serving(*words, "--token-file", place[0] / "token") as closed_server:
        yield server.url, closed_server.url


def probabilities(top):
    return [each["probability"] for each in sorted(top, key=lambda each: each["label"])]


def check_answer(line, text, expected):
    """Compare the answer to a line of the documentation with the prediction of the network."""
    if line.endswith(("/metrics", "/healthz", "/readyz", "/metadata", "/models/fashion")):
        return
    answer = json.loads(text)
    if ":predict" in line:
        found = answer["predictions"][0]
    elif "/infer" in line:
        found = {output["name"]: output["data"] for output in answer["outputs"]}["predictions"]
    else:  # the most probable classes
        assert [each["class"] for each in answer["top"]] == [each["class"] for each in expected[: len(answer["top"])]]
        found = [each["probability"] for each in answer["top"]]
        expected = expected[: len(found)]
        assert found == pytest.approx([each["probability"] for each in expected], abs=1e-5)
        return
    assert found == pytest.approx(probabilities(expected), abs=1e-5)  # float32, in another order of operations


def test_each_line_of_the_documentation_gets_the_prediction_of_the_network(place, predicted, servers):
    lines = [line for page in PAGES for line in LINE.findall(page.read_text())]
    assert len(lines) >= 12
    for line in lines:
        url = servers["Bearer" in line]
        command = line.replace(URL, url).replace("curl", "curl -sS --fail-with-body --max-time 60", 1)
        ended = subprocess.run(["bash", "-c", command], cwd=place[0], capture_output=True, text=True, timeout=90)
        assert ended.returncode == 0, f"{line}: {ended.stdout}{ended.stderr}"
        check_answer(line.replace("'", ""), ended.stdout, predicted[0])
    refused = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"{servers[1]}/metrics"]
    assert subprocess.run(refused, capture_output=True, text=True, timeout=90).stdout == "401"


def test_the_request_of_the_tutorial_of_tensorflow_serving(place, predicted, servers):
    """Its images have a channel dimension of 1."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/serving.md").read_text(), re.M | re.S)
    for test_images in (place[1], place[1].reshape(*place[1].shape, 1)):
        names = {"test_images": test_images}
        exec(code.replace(URL, servers[0]), names)
        for found, expected in zip(names["predictions"], predicted, strict=True):
            assert found == pytest.approx(probabilities(expected), abs=1e-5)
