"""Exported files compute what the network computes; a file that does not, or a killed export, leaves no version."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIMIT_S, REPO, run_command
from forked import run_python
from PIL import Image
from serve_models import serving

from distlenet import ImageClassification, UserError, load_config, load_model
from distlenet.checkpoint.format import load_checkpoint, write_atomically
from distlenet.checkpoint.store import find_checkpoint
from distlenet.data.sources import load_data, load_images
from distlenet.export.__main__ import main
from distlenet.export.fresh_process import compare_in_fresh_processes
from distlenet.export.graph import trace, write_pt2
from distlenet.export.measured import FileResult, check_int8
from distlenet.export.tolerances import RoundingError
from distlenet.export.trained_source import load_source
from distlenet.export.version_directory import new_version, versions
from distlenet.serve.exporting import is_model
from distlenet.tasks.registry import make_task

pytestmark = [pytest.mark.unit, pytest.mark.slow]

SAMPLES = 360  # of the test set of digits
MAX_DROP = round(0.5 + 100 / SAMPLES, 3)  # points: the default, and one sample

TORCH_FREE = """
import sys
sys.modules["torch"] = None  # an import of torch fails
from distlenet.export import parity
parity.main()
assert not {"omegaconf", "torchvision", "distlenet.config", "distlenet.task"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training on the bundled digits."""
    directory = tmp_path_factory.mktemp("export")
    settings = ("data.name=digits", "train.epochs=4", "optim.lr=0.05", f"run.dir={directory}", "run.name=run")
    run_python("-m", "distlenet.train", *settings, "device=cpu", "precision=fp32").succeeded()
    return directory


@pytest.fixture(scope="module")
def exported(run):
    """All formats of LeNet, and what was printed."""
    words = ("--to", "pt2", "onnx", "safetensors", "triton", "triton", "--quantize", "int8", "--max-drop", MAX_DROP)
    ended = run_python("-m", "distlenet.export", run / "run", *words, "--out", run / "model").succeeded()
    return ended, json.loads((run / "model/1/model.json").read_text())


@pytest.fixture
def export(monkeypatch):
    """Run the command in this process; return model.json of the first version."""

    def run(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["distlenet.export", *map(str, words)])
        main()
        out = Path(words[words.index("--out") + 1])
        return json.loads((out / "1/model.json").read_text())

    def start(command: list, **_: object) -> SimpleNamespace:  # the fixture ``exported`` starts a new interpreter
        ended = run_python(*command[1:])
        return SimpleNamespace(returncode=ended.status, stderr=ended.stderr)

    monkeypatch.setattr("distlenet.export.fresh_process.subprocess", SimpleNamespace(run=start))
    monkeypatch.syspath_prepend(str(REPO / "tests"))
    monkeypatch.setenv("PYTHONPATH", f"{REPO / 'tests'}{os.pathsep}{REPO}")
    return run


def write_checkpoint(path: Path, *settings: str, steps: int = 0) -> Path:
    """Write the checkpoint of a network that has seen a batch of the training set, and was trained on it."""
    config = load_config([], [*settings, "device=cpu"])
    torch.manual_seed(0)
    task = make_task(config)
    train = task.datasets().train
    samples = [train[index] for index in range(0, len(train), -(-len(train) // 64))]
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for step in range(steps + 1):
        loss, _ = task.loss(model, task.transform(task.collate(samples), None))
        if step < steps:
            loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    state = {"model": model.state_dict(), "config": config.to_dict(), "task": task.state_dict(), "step": 1, "epoch": 0}
    write_atomically(state, path)
    return path


def test_each_file_gives_the_classes_of_the_network_over_the_whole_test_set(run, exported):
    files = exported[1]["files"]
    assert files.keys() == {"model.onnx", "model.pt2", "model.safetensors", "model.int8.onnx"}
    accuracy = json.loads((run / "run/summary.json").read_text())["test_accuracy"]
    for name in files.keys() - {"model.int8.onnx"}:
        entry = files[name]
        assert (entry["samples"], entry["same_classes"] + entry["within_rounding"]) == (SAMPLES, SAMPLES)
        assert entry["largest_difference"] <= entry["tolerance"] < 1e-4
        assert entry["metrics"]["accuracy"] == pytest.approx(accuracy, abs=entry["within_rounding"] / SAMPLES + 1e-12)
    assert files["model.int8.onnx"]["metrics"]["accuracy"] >= accuracy - MAX_DROP / 100 - 1e-12
    assert files["model.int8.onnx"]["bytes"] < files["model.onnx"]["bytes"] / 3


def test_the_files_are_those_that_were_checked(run, exported):
    version = run / "model/1"
    for name, entry in exported[1]["files"].items():
        content = (version / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert str(REPO).encode() not in content
    assert {path.name for path in version.iterdir()} == {*exported[1]["files"], "model.json", "triton"}
    assert [path.name for path in (run / "model").iterdir()] == ["1"]


def test_model_json_has_the_sha256_of_each_file_of_a_directory(run, exported):
    version = run / "model/1"
    names = [path.relative_to(version).as_posix() for path in version.glob("triton/**/*") if path.is_file()]
    assert {"triton/run/config.pbtxt", "triton/run/labels.txt", "triton/run/1/model.onnx"} == {*names}
    assert exported[1]["bundles"].keys() == {*names}
    for name, entry in exported[1]["bundles"].items():
        content = (version / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_model_json_describes_the_network(run, exported):
    metadata = exported[1]
    size = metadata["images"]["size"]
    file = find_checkpoint(run / "run")
    assert (metadata["format"], metadata["name"], metadata["check"]) == (1, "run", "test")
    assert metadata["inputs"] == {"images": {"dtype": "uint8", "shape": [None, *size]}}
    assert metadata["outputs"]["predictions"] == {"dtype": "float32", "shape": [None, 10]}
    assert metadata["classes"] == [str(digit) for digit in range(10)]
    assert metadata["checkpoint"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert metadata["checkpoint"]["step"] == load_checkpoint(file)["step"]


def test_nothing_but_the_table_is_printed(exported):
    ended, metadata = exported
    assert ended.stderr == ""
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("[Gloo]")]  # torch 2.10 prints it
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


def test_onnx_is_compared_without_pytorch_and_a_difference_is_found(run, exported, tmp_path):
    images = load_data(load_config([], ["data.name=digits"]).data).test.images[:20]
    with torch.no_grad():
        logits = load_model(run / "run")(images)
    arrays = {"images": images, "outputs": logits, "predictions": logits.softmax(1)}
    for name, tensor in arrays.items():
        np.save(tmp_path / f"00000.{name}.npy", tensor.numpy())
    wrong = logits.clone()
    wrong[3] = logits[3].roll(1)
    for name, tensor in {**arrays, "outputs": wrong, "predictions": wrong.softmax(1)}.items():
        np.save(tmp_path / f"00001.{name}.npy", tensor.numpy())
    tolerances = {"outputs": 1e-4, "predictions": 1e-5}  # as the test above allows
    for parts, same in ((["00000"], 20), (["00000", "00001"], 39)):
        job = {"parts": parts, "singles": parts[:1], "inputs": ["images"], "outputs": ["outputs", "predictions"]}
        networks = {"model.onnx": [str(run / "model/1/model.onnx")]}
        job |= {"tolerances": tolerances, "networks": networks, "network": {}}
        (tmp_path / "job.json").write_text(json.dumps(job))
        run_command(sys.executable, "-c", TORCH_FREE, tmp_path).succeeded()
        result = json.loads((tmp_path / "results.json").read_text())["model.onnx"]
        assert (result["same_classes"], result["samples"], result["within_rounding"]) == (same, 20 * len(parts), 0)
        assert (result["largest_difference"] < 1e-4) == (same == 20)


def test_batchnorm_a_center_crop_and_shared_weights(export, tmp_path):
    names = ("data.name=export_tasks:colors", "model.name=export_tasks:SmallResNet")
    file = write_checkpoint(tmp_path / "net.pt", *names, "data.crop=8", "data.flip=0.5", steps=20)
    words = ("--to", "onnx", "pt2", "safetensors", "--quantize", "int8", "--max-drop", 2.5)  # one sample of 40
    metadata = export(file, *names, *words, "--out", tmp_path / "model", "--name", "net")
    exact = {name: entry for name, entry in metadata["files"].items() if name != "model.int8.onnx"}
    assert [entry["same_classes"] + entry["within_rounding"] for entry in exact.values()] == [40] * 3
    assert exact["model.onnx"]["metrics"]["accuracy"] > 0.5  # 1/3 by chance: there is something to lose
    assert metadata["inputs"]["images"]["shape"] == [None, 3, 12, 10]
    stored = (tmp_path / "model/1/model.safetensors").read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    assert json.loads(header["__metadata__"]["tied"]) == {"second.weight": "first.weight", "second.bias": "first.bias"}
    assert "second.weight" not in header


def test_inputs_by_name_of_several_lengths(export, tmp_path):
    file = write_checkpoint(tmp_path / "pairs.pt", "task.name=export_tasks:Pairs")
    metadata = export(file, "task.name=export_tasks:Pairs", "--to", "onnx", "--out", tmp_path / "model")
    assert metadata["inputs"]["values"] == {"dtype": "float32", "shape": [None, 2, None]}
    assert metadata["inputs"]["lengths"] == {"dtype": "int64", "shape": [None]}
    assert metadata["name"] == "pairs"
    assert metadata["images"] is metadata["classes"] is None
    assert metadata["files"]["model.onnx"]["metrics"].keys() == {"error"}


def write_mails(directory: Path) -> None:
    """Write mails of 5 to 100 words, drawn from overlapping parts of a vocabulary."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(60)]
    for number in range(200):
        group, words = ("spam-1", vocabulary[:40]) if number % 2 else ("easy-ham-1", vocabulary[20:])
        path = directory / group / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Subject: {words[0]}\n\n{' '.join(draw.choices(words, k=draw.randint(5, 100)))}\n")


def test_the_example_spam(export, monkeypatch, tmp_path):
    """Numbers of words, of several lengths; int8 with an embedding."""
    monkeypatch.syspath_prepend(str(REPO / "examples/spam"))
    write_mails(tmp_path / "mails")
    settings = ("task.name=spam:Spam", f"data.root={tmp_path / 'mails'}")
    file = write_checkpoint(tmp_path / "spam.pt", *settings, "task.args.max_words=70", steps=20)
    words = ("--to", "onnx", "pt2", "safetensors", "--quantize", "int8", "--max-drop", 10)
    metadata = export(file, *settings, *words, "--out", tmp_path / "model", "--name", "spam")
    assert metadata["inputs"] == {"inputs": {"dtype": "int64", "shape": [None, None]}}
    assert metadata["classes"] == ["ham", "spam"]
    for name in ("model.onnx", "model.pt2", "model.safetensors"):
        entry = metadata["files"][name]
        assert entry["same_classes"] + entry["within_rounding"] == entry["samples"] >= 10
        assert entry["metrics"]["accuracy"] > 0.8
    check_the_client_of_the_example_spam(file, tmp_path, monkeypatch)


def check_the_client_of_the_example_spam(file: Path, directory: Path, monkeypatch) -> None:
    """Run the client in its README; compare with the prediction of the network for mails with words of both classes."""
    from spam import Spam

    monkeypatch.chdir(directory)
    Path("package/data/spam-1").mkdir(parents=True)
    ham, spam = (sorted(Path("mails", group).glob("*.txt")) for group in ("easy-ham-1", "spam-1"))
    for number, pair in enumerate(zip(ham, spam, strict=True)):
        words = [word for path in pair for word in path.read_text().split()[2 : 10 + 10 * number]]
        Path(f"package/data/spam-1/{number:03}.txt").write_text(f"Subject: unknown\n\n{' '.join(words)}\n")
    *_, code = re.findall(r"^```python\n(.*?)^```", (REPO / "examples/spam/README.md").read_text(), re.M | re.S)
    mails = [path.read_bytes() for path in sorted(Path("package/data/spam-1").glob("*.txt"))[:3]]
    for words, tolerance in (((), 1e-5), (("--int8",), 0.1)):
        names = {"print": lambda values: names.update(printed=values)}  # noqa: B023
        with serving(directory / "model", *words) as server:
            exec(code.replace(URL, server.url), names)
        expected = load_model(file, Spam)(mails).sigmoid().tolist()
        assert any(0.01 < each < 0.99 for each in expected)  # wrong numbers of words would show
        assert names["printed"] == pytest.approx(expected, abs=tolerance)


def test_a_network_that_mixes_the_samples_of_a_batch_is_refused(export, fails, tmp_path):
    names = ("data.name=export_tasks:colors", "model.name=export_tasks:Mixing")
    file = write_checkpoint(tmp_path / "net.pt", *names)
    for check in ("test", "random"):
        line = fails(lambda: export(file, *names, "--to", "onnx", "--check", check, "--out", tmp_path / "x"))  # noqa: B023
        assert "an answer would depend on the requests of other users" in line


def test_what_a_format_cannot_hold_is_an_error_before_the_comparison(export, fails, monkeypatch, tmp_path):
    file = write_checkpoint(tmp_path / "pairs.pt", "task.name=export_tasks:Pairs")
    words = ("task.name=export_tasks:ComplexPairs", "--out", tmp_path / "x")
    assert "input values: Triton has no type complex64" in fails(lambda: export(file, *words, "--to", "triton"))
    monkeypatch.setattr("distlenet.export.exporter.check_runtime", lambda _: None)
    assert "--to web: the page reads image files" in fails(lambda: export(file, *words, "--to", "web"))


def test_a_full_disk_is_one_line(tmp_path):
    program = trace(torch.nn.Linear(2, 2), {"input": torch.zeros(2, 2)}, {"input": {0}})
    (tmp_path / "model.pt2").symlink_to("/dev/full")
    message = r"^--out .*/model: cannot be read or written: No space left on device; check its disk$"
    with pytest.raises(UserError, match=message), new_version(tmp_path / "model"):
        write_pt2(program, tmp_path / "model.pt2", "{}")


def test_a_disk_error_of_another_file_names_it(tmp_path):
    with pytest.raises(UserError, match=r"^/data/images: cannot be read or written"), new_version(tmp_path / "model"):
        raise OSError(errno.EIO, "Input/output error", "/data/images")


def test_a_directory_with_a_version_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "1").symlink_to(300 * "x")
    with pytest.raises(UserError, match=r": cannot be read: File name too long$"):
        is_model(tmp_path)


def test_a_task_that_cannot_predict_without_targets_is_an_error(export, fails, tmp_path):
    settings = ("task.name=prove_tasks:Correct",)
    file = write_checkpoint(tmp_path / "task.pt", *settings, steps=1)
    words = (file, *settings, "--to", "onnx", "--out", tmp_path / "model")
    assert "Correct.predict: the default needs targets" in fails(lambda: export(*words))
    assert not (tmp_path / "model").exists()


def test_only_graphs_are_split(export, fails, run, tmp_path):
    words = (run / "run", "--to", "safetensors", "--split", "--out", tmp_path / "model")
    assert "--split: no file of --to safetensors is split" in fails(lambda: export(*words))


def test_a_killed_export_leaves_no_process(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec > {tmp_path}/pipe\necho started\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    reference = SimpleNamespace(parts=1, singles=0, example={}, tolerances={})
    words = (tmp_path, SimpleNamespace(file="x", overrides=(), files=()), reference, {"model.onnx": []})
    process = multiprocessing.get_context("fork").Process(target=compare_in_fresh_processes, args=words)
    process.start()
    with (tmp_path / "pipe").open() as pipe:
        assert pipe.readline() == "started\n"
        process.kill()
        process.join()
        assert select.select([pipe], [], [], LIMIT_S)[0], "the child still runs"


def test_versions_are_directories_with_a_number_that_the_server_accepts(tmp_path):
    for name in ("01", "\u0663", "\u00b2", "1" + 18 * "0", "-1"):
        (tmp_path / name).mkdir()
    assert versions(tmp_path) == []
    assert not is_model(tmp_path)
    for number in (9, 10**18 - 1):
        (tmp_path / str(number)).mkdir()
    assert versions(tmp_path) == [9, 10**18 - 1]
    assert is_model(tmp_path)
    with (
        pytest.raises(UserError, match=r"has version 999999999999999999, the largest; give another directory"),
        new_version(tmp_path) as version,
    ):
        version.publish()


def test_a_file_that_computes_something_else_is_not_published(export, fails, run, tmp_path):
    name = "task.name=export_tasks:WrongWhenExported"
    line = fails(lambda: export(run / "run", name, "--to", "onnx", "--out", tmp_path / "a/model"))
    assert "model.onnx: does not compute what the network computes: outputs differ by up to 0.01" in line
    assert not (tmp_path / "a/model").exists()


def test_weights_without_a_part_of_the_network_are_not_published(export, fails, run, tmp_path):
    names = ("data.name=export_tasks:colors", "model.name=export_tasks:Unsaved")
    file = write_checkpoint(tmp_path / "net.pt", *names, "data.args.count=12")
    (tmp_path / "model/1").mkdir(parents=True)
    line = fails(lambda: export(file, *names, "--to", "safetensors", "--out", tmp_path / "model"))
    assert "model.safetensors: does not compute what the network computes" in line
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["1"]


def test_without_the_data_random_samples_are_compared_if_requested(export, fails, run, tmp_path):
    """Also the transform and the network apart."""
    data = ("data.name=mnist", f"data.root={tmp_path}")
    words = (run / "run", *data, "--to", "onnx", "--out", tmp_path / "model")
    assert "; or give --check random" in fails(lambda: export(*words))
    assert not (tmp_path / "model").exists()
    metadata = export(*words, "--check", "random", "--split")
    assert metadata["check"] == "random"
    assert metadata["files"].keys() == {"model.onnx", "transform.onnx", "network.onnx"}
    for entry in metadata["files"].values():
        assert (entry["samples"], entry["same_classes"] + entry["within_rounding"], entry["metrics"]) == (256, 256, {})


def test_a_killed_export_leaves_no_version_and_the_next_one_cleans_up(run, tmp_path):
    words = ("-m", "distlenet.export", run / "run", "task.name=export_tasks:KilledWhenExported", "--to", "onnx")
    env = {"PYTHONPATH": str(REPO / "tests")}
    assert run_python(*words, "--out", tmp_path / "model", env=env).status == -9
    (left,) = (tmp_path / "model").iterdir()
    assert left.name.startswith(".exporting-")
    with new_version(tmp_path / "model"):
        assert left.exists()  # it is young: its process may be about to lock it
    os.utime(left, (0, 0))
    with new_version(tmp_path / "model") as running:
        os.utime(running.path, (0, 0))
        with new_version(tmp_path / "model"):
            assert running.path.exists()  # it is old, but locked
        assert not left.exists()
    assert list((tmp_path / "model").iterdir()) == []


def test_two_exports_at_once_get_two_numbers(tmp_path):
    model = tmp_path / "model"
    with new_version(model) as first, new_version(model) as second:
        for version, content in ((first, "first"), (second, "second")):
            (version.path / "file").write_text(content)
        assert [second.publish(), first.publish()] == [model / "1", model / "2"]
    assert [(model / number / "file").read_text() for number in ("1", "2")] == ["second", "first"]
    (model / "10").mkdir()
    (model / "10/file").touch()
    with new_version(model) as third:
        (third.path / "file").touch()
        assert third.publish() == model / "11"


def test_a_number_that_is_taken_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    with new_version(tmp_path / "model") as version:
        (version.path / "file").touch()
        other = tmp_path / "model/1"
        monkeypatch.setattr("distlenet.export.version_directory.versions", lambda _: [])  # seen before the other export
        other.mkdir()
        (other / "other").touch()
        assert version.publish() == tmp_path / "model/2"
    assert (other / "other").exists()


def test_the_weights_that_are_named_are_exported(run, tmp_path):
    state = load_checkpoint(find_checkpoint(run / "run"))
    shutil.copytree(run / "run", tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    with pytest.raises(UserError, match=r"--weights best: .* has no checkpoints/best\.pt"):
        load_source(str(tmp_path / "run"), "best", (), ())
    with pytest.raises(UserError, match=r"--weights ema: .* has no average, see train\.ema_decay"):
        load_source(str(tmp_path / "run"), "ema", (), ())
    scaled = {number: {key: number * value for key, value in state["model"].items()} for number in (2, 3)}
    write_atomically({**state, "ema": scaled[2]}, find_checkpoint(tmp_path / "run"))
    write_atomically({**state, "model": scaled[3]}, checkpoints / "best.pt")
    for weights, expected, name in (("last", 1, "last"), ("ema", 2, "ema"), (None, 2, "ema"), ("best", 3, "best")):
        source = load_source(str(tmp_path / "run"), weights, (), ())
        found = source.trained.model.state_dict()["fc3.bias"]
        assert torch.equal(found, expected * state["model"]["fc3.bias"])
        assert (source.weights, source.name) == (name, "run")


def test_a_loss_of_accuracy_by_int8_is_refused():
    exact, quantized = (FileResult(1000, 0.0, 0.0, 990, 0, {"accuracy": value}) for value in (0.9, 0.894))
    check_int8(exact, quantized, 0.7)
    with pytest.raises(
        UserError, match=r"the accuracy falls from 90.00% to 89.40%, by more than --max-drop 0.5 points"
    ):
        check_int8(exact, quantized, 0.5)
    exact.metrics, quantized.metrics = {}, {}
    with pytest.raises(UserError, match=r"the agreement with the network falls from 100.00% to 99.00%"):
        check_int8(exact, quantized, 0.5)


def test_the_rounding_error_is_that_of_float32():
    error = RoundingError(lambda x: {"outputs": x.float() / 3})
    error.measure({"x": torch.ones(1, 1, dtype=torch.uint8)})
    assert error.errors["outputs"] == abs(float(np.float32(1) / np.float32(3)) - 1 / 3) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx"], "the following arguments are required: --out"),
        (["--to", "bmp", "--out", "x"], "invalid choice: 'bmp'"),
        (
            ["--to", "onnx", "--out", "x", "--name", "a/b"],
            "a/b: expected the characters a-z, A-Z, 0-9, '.', '_' and '-', starting with one of a-z, A-Z or 0-9",
        ),
        (["--to", "onnx", "--out", "x", "--max-drop", "many"], "many: expected percentage points"),
        (["--to", "onnx", "--out", "x", "--quantize", "int8", "--check", "random"], "--quantize int8: needs the data"),
        (["another", "--to", "onnx", "--out", "x"], "expected one run or checkpoint file, not 2"),
    ],
)
def test_usage_errors_are_one_line(export, fails, words, message):
    assert message in fails(lambda: export("run", *words))


def test_a_missing_package_is_named(export, fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = fails(lambda: export("run", "--to", "onnx", "--out", tmp_path / "x"))
    assert "onnxscript: not installed; pip install 'distlenet[export]'" in line


def test_a_task_without_a_pair_is_asked_for_its_inputs():
    task = ImageClassification(load_config([], ["data.name=digits"]))
    assert torch.equal(task.export_inputs((torch.ones(2), torch.zeros(2))), torch.ones(2))
    with pytest.raises(UserError, match=r"define ImageClassification\.export_inputs, which returns the tensors"):
        task.export_inputs({"a": torch.ones(2)})


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


def test_probabilities_near_0_may_differ_by_roundings_of_1():
    # A sigmoid of ONNX Runtime differs from that of PyTorch by 4e-12 at such logits, 1e7 times the probability.
    error = RoundingError(lambda x: {"outputs": x, "predictions": x.sigmoid()})
    logits = torch.full((4, 1), -42.0)
    error.measure({"x": logits})
    error.observe({"outputs": logits, "predictions": logits.sigmoid()})
    assert 1e-8 < error.tolerances()["predictions"] < 1e-6
