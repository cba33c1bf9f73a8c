"""Each command line of the documentation runs, or a comment in its page gives the reason why not.

The commands run in this process, in a directory with the files that the pages mention. The launcher is left out, a
training is composed with --dry-run, and preflight and prove stop when they have read their arguments. Commands that
cannot run in this way are in ``ELSEWHERE``, with the test that runs them, or under ``<!-- not run: REASON -->``.
"""

import io
import re
import shlex
import shutil
import sys
import tarfile
import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy
import pytest
from conftest import REPO, run_command
from PIL import Image
from test_docs import PAGES, relative
from torch.distributed import run as torchrun

from distlenet import load_config, train
from distlenet.preflight.finding import PreflightReport

pytestmark = [pytest.mark.unit, pytest.mark.slow]

BLOCK = re.compile(
    r"^( *)(?:<!-- not run: (?P<reason>[^\n]+) -->\s+)?```(?P<kind>\w+)\n(?P<code>.*?)^ *```", re.M | re.S
)
EXTRAS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]

ELSEWHERE = {
    r"python3 -m venv env|pip install \.|\. (env|\.venv)/bin/activate": "tests/unit/test_package.py",
    r"distlenet --help": "tests/unit/test_package.py",
    r"cd examples/\w+|python make_folder\.py .*": "tests/ranks/test_examples.py",
    r"(python|torchrun) .* --config (config|folder)\.yaml.*": "tests/ranks/test_examples.py",
    r"python (draw\.py|-m distlenet.report) runs/first.*": "tests/ranks/test_example_vae.py",
    r"python -m distlenet\.evaluate checkpoint=runs/Spam-.*": "tests/unit/test_readme.py",
    r"python -m distlenet\.report runs/NAME --replay-wandb": "tests/ranks/test_wandb.py",
    r".*benchmarks/\w+\.py.*": "tests/unit/test_benchmarks.py",  # their --help
    r"python -m distlenet\.\w+ .*s3://.*": "tests/ranks/test_object_store.py",
    r"torchrun .* run\.dir=s3://.*": "tests/ranks/test_object_store.py",
    r"(python -m distlenet\.|distlenet )export runs/\w+ .*": "tests/unit/test_export.py",
    r"python -m http\.server .*": "tests/browser/test_prediction_page.py",
    r"distlenet serve models/(fashion|spam).*": "tests/unit/test_export.py",
    r"curl .*http://127\.0\.0\.1:8000/.*": "tests/unit/test_export.py",
    r"\.venv/bin/pytest .*": ".ci/run",
}
"""Commands, as regular expressions, and what runs them."""

WHAT_TO_DO = (
    "no test runs this command. Teach run_line or the fixture place of tests/unit/test_commands.py to run it, add it "
    "to ELSEWHERE there with the test that runs it, or write <!-- not run: REASON --> above its block"
)


class NoRule(Exception):
    """A command that ``run_line`` cannot run."""


@dataclass(frozen=True)
class Block:
    """The commands of a shell block, without comments. ``reason``: why some are not run."""

    place: str
    commands: list[str]
    reason: str | None


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(), []
    for block in BLOCK.finditer(text):
        if block["kind"] in ("sh", "bash", "shell", "console"):
            lines = re.sub(r"(^|\s)#\s.*", "", block["code"].replace("\\\n", " "), flags=re.M).splitlines()
            commands = [" ".join(part.split()) for line in lines for part in line.split("&&") if part.strip()]
            number = text.count("\n", 0, block.start("code"))
            found.append(Block(f"{relative(page)}:{number + 1}", commands, block["reason"]))
    return found


def make_images(directory: Path, classes: int, mode: str) -> None:
    for part in ("train", "test"):
        for number in range(classes):
            (directory / part / str(number)).mkdir(parents=True)
            for image in range(5):
                Image.new(mode, (28, 28)).save(directory / part / str(number) / f"{image}.png")


def write_shard(file: Path, directory: Path) -> None:
    with tarfile.open(file, "w") as shard:
        for path in sorted(directory.rglob("*.png")):
            key = "-".join(path.relative_to(directory).with_suffix("").parts)
            shard.add(path, f"{key}.png")
            label = tarfile.TarInfo(f"{key}.cls")
            label.size = len(path.parent.name)
            shard.addfile(label, io.BytesIO(path.parent.name.encode()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the images, modules and runs that the pages mention."""
    place = tmp_path_factory.mktemp("place")
    for name in ("data", "slurm", "launch", "Makefile"):
        (place / name).symlink_to(REPO / name)
    make_images(place / "flowers", 2, "RGB")
    make_images(place / "disk/flowers", 10, "RGB")
    make_images(place / "disk/letters", 10, "L")
    (place / "disk/shards").mkdir()
    for part in ("train", "test"):
        write_shard(place / f"disk/shards/{part}-0.tar", place / f"disk/letters/{part}")
    for name in ("images", "more"):
        shutil.copytree(place / "disk/letters/test/0", place / name)
    shutil.copy(place / "images/0.png", place / "shoe.jpg")
    images, labels = numpy.zeros((10, 28, 28), numpy.uint8), numpy.arange(10)
    arrays = {
        f"{part}_{kind}": array
        for part in ("train", "test")
        for kind, array in (("images", images), ("labels", labels))
    }
    numpy.savez(place / "letters.npz", **arrays)
    for module, page, number in (
        ("spam", "README.md", -1),
        ("my_tasks", "docs/tasks.md", 0),
        ("circle", "docs/migration.md", 0),
        ("tasks", "docs/migration.md", -1),
    ):
        code = re.findall(r"^```python\n(.*?)^```", (REPO / page).read_text(), re.M | re.S)
        (place / f"{module}.py").write_text(code[number])
    (place / "my_package").mkdir()
    shutil.copy(place / "spam.py", place / "my_package/tasks.py")
    (place / "my.yaml").write_text("data: {name: digits}")
    settings = ["data.name=digits", "data.validation=0.1", "run.name=NAME", f"run.dir={place}/runs", "device=cpu"]
    train(load_config([], [*settings, "train.max_steps=1"]))
    for name in ("first", "ONE", "TWO", "OTHER"):
        (place / "runs" / name).symlink_to("NAME")
    return place


@pytest.fixture(scope="module")
def passed():
    """Commands that have run: several pages have the same ones."""
    return set()


@pytest.fixture
def run_line(place, monkeypatch):
    """Run a command, and raise what it raises."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def run(line: str) -> None:
        words = shlex.split(line.replace("=/data/", f"={place}/disk/"))
        program = words[0].removeprefix(".venv/bin/")
        if program == "make":
            run_command("make", "--dry-run", *words[1:], env={"NPROC": "2"}).succeeded()
        elif program == "pip" and (extra := re.fullmatch(r"distlenet\[(\w+)\]", words[-1])):
            assert extra[1] in EXTRAS
        elif program == "torchrun":
            options = torchrun.parse_args(words[1:])
            run_module(options.training_script, options.training_script_args, options.nproc_per_node)
        elif program in ("srun", "mpirun", "python") and "-m" in words:
            launched = words[words.index("python") :]
            run_module(launched[2], launched[3:])
        elif program == "distlenet":
            run_module(f"distlenet.{words[1]}", words[2:])
        elif scripts := [word for word in words if re.fullmatch(r"(slurm|launch)/\w+\.(sbatch|sh)", word)]:
            run_script(*scripts, words)
        else:
            raise NoRule

    def run_script(script: str, words: list[str]) -> None:
        """Check the settings; tests/cluster runs the scripts."""
        text = (place / script).read_text()
        if words[0] == script:
            assert {word for word in words if word.startswith("--")} <= {*re.findall(r"--[\w-]+", text)}
        settings = [word for word in words[words.index(script) + 1 :] if "=" in word and word[0] != "-"]
        run_module("distlenet.preflight" if "preflight" in script else "distlenet.train", settings)

    def run_module(name: str, arguments: list[str], ranks: str = "1") -> None:
        package = (REPO / name.replace(".", "/")).is_dir()
        module = import_module(f"{name}.__main__" if package else name)
        if name == "distlenet.train" and "--dry-run" not in arguments:
            arguments = [*arguments, "--dry-run", "--world-size", ranks]
        reads_data = name in ("distlenet.train", "distlenet.preflight", "distlenet.prove")
        if reads_data and not re.search(r"--config|(data|task)\.name=", " ".join(arguments)):
            arguments = [*arguments, "data.name=digits"]  # loaded much faster than the default, Fashion-MNIST
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module.main()

    with (
        mock.patch("distlenet.preflight.__main__.run_checks", return_value=PreflightReport([])),
        mock.patch("distlenet.prove.__main__.Proof"),
    ):
        yield run
    for module in [
        module for module in sys.modules if re.fullmatch(r"spam|my_tasks|circle|tasks|my_package(\.tasks)?", module)
    ]:
        del sys.modules[module]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=relative)
def test_each_command_runs(page, run_line, passed):
    problems = []
    for block in blocks(page):
        unknown = []
        for command in block.commands:
            if command in passed or any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
                continue
            try:
                run_line(command)
                passed.add(command)
            except NoRule:
                unknown.append(command)
            except (Exception, SystemExit) as error:
                problems.append(f"{block.place}: {command}: {type(error).__name__}: {error}")
        if unknown and block.reason is None:
            problems += [f"{block.place}: {command}: {WHAT_TO_DO}" for command in unknown]
        if block.reason and not unknown:
            problems.append(f"{block.place}: all commands run; remove <!-- not run: {block.reason} -->")
    assert not problems, "\n".join(problems)


def test_no_entry_of_the_table_is_stale():
    lines = [command for page in PAGES for block in blocks(page) for command in block.commands]
    assert [pattern for pattern in ELSEWHERE if not any(re.fullmatch(pattern, line) for line in lines)] == []
    assert [path for path in ELSEWHERE.values() if not (REPO / path).is_file()] == []
