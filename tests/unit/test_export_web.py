"""``--to web``: the directory for a static host. tests/browser runs it in Chromium."""

import json
import re

import pytest
from conftest import REPO

from distlenet.export.web import RUNTIME_FILES, check_runtime, write_web
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

METADATA = {"name": "digits", "images": {"channels": 1}, "inputs": {}}
PACKAGE = {"name": "onnxruntime-web", "version": "1.30.0"}
FIX = "run npm install onnxruntime-web, or give --onnxruntime-web DIR"


@pytest.fixture
def runtime(tmp_path):
    """Something like the installed npm package."""
    (tmp_path / "npm/dist").mkdir(parents=True)
    (tmp_path / "npm/package.json").write_text(json.dumps(PACKAGE))
    for name in (*RUNTIME_FILES, "ort.webgpu.mjs"):
        (tmp_path / "npm/dist" / name).write_text(name)
    return tmp_path / "npm"


def test_the_directory_has_the_page_the_network_and_the_runtime(runtime, tmp_path):
    version = tmp_path / "1"
    version.mkdir()
    (version / "model.onnx").write_bytes(b"network")
    write_web(version, METADATA, runtime)
    web = version / "web"
    page = {path.name for path in (REPO / "distlenet/page").iterdir()}
    assert {path.name for path in web.iterdir()} == page | {"page.json", "model.json", "model.onnx", "ort"}
    assert {path.name for path in (web / "ort").iterdir()} == {*RUNTIME_FILES}
    settings = json.loads((web / "page.json").read_text())
    assert settings.pop("backend") == "web"
    assert all((web / name).exists() for name in settings.values())
    assert json.loads((web / "model.json").read_text()) == METADATA
    assert (web / "model.onnx").read_bytes() == b"network"


def test_a_model_that_reads_no_images_is_an_error(runtime, tmp_path):
    with pytest.raises(UserError, match="reads none: remove web from --to"):
        write_web(tmp_path, {**METADATA, "images": None}, runtime)
    assert not (tmp_path / "web").exists()


@pytest.mark.parametrize(
    ("package", "problem"),
    [
        (None, "is not the npm package onnxruntime-web"),
        ("{", "is not the npm package onnxruntime-web"),
        ("[]", "is not the npm package onnxruntime-web"),
        ({**PACKAGE, "name": "onnxruntime-node"}, "is not the npm package onnxruntime-web"),
        ({**PACKAGE, "version": "x"}, "is not the npm package onnxruntime-web"),
        ({**PACKAGE, "version": "1.22.2"}, "is version 1.22.2, expected 1.23 or later"),
    ],
)
def test_a_wrong_package_is_an_error(runtime, package, problem):
    (runtime / "package.json").unlink()
    if package is not None:
        text = package if isinstance(package, str) else json.dumps(package)
        (runtime / "package.json").write_text(text)
    with pytest.raises(UserError, match=f"^--to web: {re.escape(str(runtime))} {problem}: {FIX}$"):
        check_runtime(runtime)


def test_a_missing_file_is_an_error(runtime):
    (runtime / "dist" / RUNTIME_FILES[1]).unlink()
    with pytest.raises(UserError, match=rf"has no file dist/{RUNTIME_FILES[1]}: {FIX}$"):
        check_runtime(runtime)


def test_the_page_has_no_inline_script_or_style_and_names_no_other_host():
    for path in (REPO / "distlenet/page").iterdir():
        text = path.read_text()
        addresses = set(re.findall(r"https?://[^\s\"')]+", text)) - {"http://www.w3.org/2000/svg"}
        assert addresses == set(), path
        if path.suffix == ".html":
            assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]+src=)", text) == []
