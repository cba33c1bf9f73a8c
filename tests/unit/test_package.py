"""The wheel, installed into an environment without the checkout; and the command ``distlenet``."""

import filecmp
import json
import os
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPO, run_command

from distlenet import __version__
from distlenet.__main__ import COMMANDS
from distlenet.config.loading import load_config
from distlenet.scripts import write_scripts
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def build(out: Path) -> list[Path]:
    """Build the source distribution, and the wheel from it."""
    run_command(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPO).succeeded()
    return sorted(out.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The ``bin`` directory of an environment with the wheel, and the other packages of this environment."""
    root = tmp_path_factory.mktemp("environment")
    run_command(sys.executable, "-m", "venv", "--without-pip", root).succeeded()
    wheel = next(path for path in built if path.suffix == ".whl")
    python = root / "bin/python"
    run_command(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel).succeeded()
    (site,) = root.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # searched after the directory of the wheel
    return root / "bin"


@pytest.mark.slow
def test_a_build_can_be_repeated_to_the_byte(built, tmp_path):
    again = build(tmp_path)
    assert [path.name for path in again] == [path.name for path in built]
    assert [path.name for path in built] == [
        f"distlenet-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz")
    ]
    for first, second in zip(built, again, strict=True):
        assert filecmp.cmp(first, second, shallow=False), first.name


@pytest.mark.slow
def test_the_wheel_has_the_recipes_and_the_scripts(built):
    names = zipfile.ZipFile(built[0]).namelist()
    for part in ("configs", "launch", "slurm"):
        files = (path for path in (REPO / part).rglob("*") if path.is_file())
        assert {f"distlenet/bundled/{path.relative_to(REPO)}" for path in files} <= {*names}
    page = (REPO / "distlenet/page").iterdir()
    assert {f"distlenet/page/{path.name}" for path in page} <= {*names}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]


@pytest.mark.slow
def test_an_installed_command_trains_in_an_empty_directory_without_a_home(installed, tmp_path):
    settings = ("--config", "ci", "train.max_steps=3", "run.name=first", "wandb.finish_timeout_s=600")
    environment = {"HOME": "/dev/null/home", "PYTHONPATH": "", "WANDB_MODE": "offline"}
    command = (installed / "distlenet", "train", *settings)
    ended = run_command(*command, cwd=tmp_path, env=environment, timeout=700).succeeded()  # W&B's process may wait
    assert ended.stderr == "", str(ended)  # no warning
    assert list((tmp_path / "runs/first/wandb").glob("offline-run-*/run-*.wandb"))
    reported = run_command(installed / "distlenet", "report", "runs/first", cwd=tmp_path, env=environment).succeeded()
    assert (reported.stdout, reported.stderr) == ("Report: runs/first/report.html\n", "")
    summary = json.loads((tmp_path / "runs/first/summary.json").read_text())
    assert summary["test_count"] == 360
    code = "import distlenet; print(distlenet.__file__)"
    where = run_command(installed / "python", "-c", code, cwd=tmp_path, env=environment)
    assert where.stdout.startswith(str(installed.parent)), str(where)


@pytest.mark.slow
def test_the_installed_scripts_are_those_of_the_checkout(installed, tmp_path):
    written = run_command(installed / "distlenet", "scripts", "job", cwd=tmp_path).succeeded().stdout.split()
    names = [Path(path).name for path in written]
    copied = [path.name for part in ("launch", "slurm") for path in (REPO / part).rglob("*") if path.is_file()]
    assert sorted([*names, "Containerfile", "distlenet.def"]) == sorted(copied)  # these two build from the checkout
    for path in (tmp_path / path for path in written):
        source = REPO / path.relative_to(tmp_path / "job")
        first, version, *rest = path.read_text().splitlines()
        assert [first, *rest] == source.read_text().splitlines()
        assert version == f"# Written by distlenet {__version__}."
        assert os.access(path, os.X_OK) == os.access(source, os.X_OK)


def test_scripts_are_never_overwritten(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/lib.sh").write_text("mine")
    with pytest.raises(UserError, match=r"slurm/lib\.sh: exists already"):
        write_scripts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]
    assert (tmp_path / "slurm/lib.sh").read_text() == "mine"


def test_a_directory_that_cannot_be_written_is_an_error_with_a_fix(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/launch\S*: cannot be written: Not a directory; give another directory$"):
        write_scripts(tmp_path / "file")


def test_help_and_a_wrong_command_do_not_import_pytorch():
    code = "import sys; from distlenet.__main__ import main; main(); assert 'torch' not in sys.modules"
    shown = run_command(sys.executable, "-c", code, "--help").succeeded().stdout
    assert all(f"  {name} " in shown for name in COMMANDS)
    wrong = run_command(sys.executable, "-m", "distlenet", "trian")
    assert (wrong.status, wrong.stderr) == (2, "distlenet: trian: no such command; did you mean train?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_module(name):
    assert any((REPO / "distlenet" / path).exists() for path in (f"{name}.py", f"{name}/__main__.py"))


def test_a_recipe_is_found_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((REPO / "configs/tutorial.yaml").read_text())
    assert load_config(["tutorial"]).train.global_batch_size == recipe["train"]["global_batch_size"]
    (tmp_path / "ci").mkdir()
    assert load_config(["ci"]) != load_config()  # a directory is not a file of settings
    (tmp_path / "tutorial").write_text("seed: 7")
    assert load_config(["tutorial"]).seed == 7  # a file of this name comes first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tutoral", "--config tutoral: no such file and no such recipe; did you mean tutorial?"),
        ("x", "--config x: no such file and no such recipe; the recipes are best, ci, default, sprint, tutorial"),
        ("tutorial.yaml", "--config tutorial.yaml: cannot be read: No such file or directory"),
        ("configs/none", "--config configs/none: cannot be read: No such file or directory"),
    ],
)
def test_a_missing_recipe_is_an_error(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config([name])
    assert str(caught.value).startswith(message)
