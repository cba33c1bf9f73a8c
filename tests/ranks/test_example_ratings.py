"""The examples of ratings and detection: trained for seconds from a copy of their directory, by the command line."""

import csv
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO
from forked import run_python, run_ranks

pytestmark = pytest.mark.ranks


def write_wheel(path: Path) -> None:
    """Write tables like those of MovieLens into a zip file, at the paths of RecBole's wheel."""
    draw = random.Random(0)
    users = [[user, draw.randint(7, 73), draw.choice("MF"), draw.choice(["writer", "none"]), "0"] for user in range(40)]
    films = [
        [film, f"Film {film}", draw.choice(["1995", ""]), draw.choice(["Comedy", "Drama War"])] for film in range(60)
    ]
    ratings = [[draw.choice(users)[0], draw.choice(films)[0], draw.randint(1, 5), 0] for _ in range(700)]
    tables = {
        "user": ("user_id age gender occupation zip_code", users),
        "item": ("item_id movie_title release_year class", films),
        "inter": ("user_id item_id rating timestamp", ratings),
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, (columns, rows) in tables.items():
            text = io.StringIO()
            writer = csv.writer(text, delimiter="\t", lineterminator="\n")
            writer.writerows([[f"{column}:token" for column in columns.split()], *rows])
            wheel.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", text.getvalue())


def prepare_ratings(directory: Path) -> None:
    write_wheel(directory / "recbole-1.2.1-py3-none-any.whl")


def nothing(directory: Path) -> None:
    pass


EXAMPLES = {
    "ratings": (
        prepare_ratings,
        ["train.epochs=2", "train.global_batch_size=96", "task.args.hidden=8", "task.args.width=4", "optim.lr=0.05"],
        ["accuracy", "auc"],
    ),
    "detection": (
        nothing,
        [
            "data.name=digits",
            "train.epochs=6",
            "train.global_batch_size=24",
            "task.args={width: 16, train_scenes: 100, validation_scenes: 20, test_scenes: 30}",
            "optim.lr=0.03",
        ],
        ["ap50", "map50", "map75"],
    ),
}
"""Each example: what writes its data, settings that make it train for seconds, and its metrics."""


@pytest.fixture(scope="module", params=EXAMPLES)
def trained(request, tmp_path_factory):
    """A copy of the example's directory, with runs on 1 and 2 ranks; settings; metrics."""
    prepare, settings, metrics = EXAMPLES[request.param]
    directory = tmp_path_factory.mktemp("examples") / request.param
    shutil.copytree(REPO / "examples" / request.param, directory)
    prepare(directory)
    given = ["--config", "config.yaml", "device=cpu", "distributed.reduction=exact", *settings]
    for ranks in (1, 2):
        run_ranks(ranks, "-m", "distlenet.train", *given, f"run.name={ranks}", cwd=directory).succeeded()
    return directory, given, metrics


def records(directory: Path, ranks: int, metrics: list[str]) -> list[dict]:
    """Return the records of a run, without what is measured."""
    lines = (directory / f"runs/{ranks}/metrics.jsonl").read_text().splitlines()
    names = ("split", "step", "count", "loss", *metrics)
    return [{name: json.loads(line).get(name) for name in names} for line in lines]


def test_the_metrics_do_not_depend_on_the_ranks(trained):
    directory, _, metrics = trained
    one, two = (records(directory, ranks, metrics) for ranks in (1, 2))
    assert one == two
    last = {record["split"]: record for record in one}
    assert all(last[split][name] > 0 for split in ("val", "test") for name in metrics)


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_repeats_the_logged_metrics(trained, split):
    directory, given, metrics = trained
    logged = [record for record in records(directory, 2, metrics) if record["split"] == split][-1]
    words = ["-m", "distlenet.evaluate", "--json", "--split", split, *given, "checkpoint=runs/2"]
    evaluated = json.loads(run_python(*words, cwd=directory).succeeded().stdout.splitlines()[-1])
    for name in ("loss", "count", *metrics):
        assert evaluated[f"{split}_{name}"] == logged[name]


def test_the_auc_is_the_share_of_ordered_pairs(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "examples/ratings")
    from ratings import area_under_curve

    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.8, 0.8]), torch.tensor([0, 1, 0, 1, 1])
    pairs = [1, 0.5, 1, 1, 1, 1]  # 0.4 against 0.1 and 0.4, and twice 0.8 against 0.1 and 0.4
    assert area_under_curve(scores, labels) == sum(pairs) / len(pairs)


def test_average_precision(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "examples/detection")
    from detection import average_precision, right_detections

    right = torch.tensor([[True, False, True, False], [False, True, False, False]])
    expected = torch.tensor([(1 + 2 / 3) / 2, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(average_precision(right, torch.tensor([2, 1])), expected)

    # Two items of class 1. The first detection matches the first item, which is then taken; the third has no item.
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    boxes = torch.zeros(16, 4)
    boxes[:4] = torch.tensor([[0, 0, 10, 9], [0, 0, 10, 10], [40, 40, 50, 50], [20, 20, 30, 31]])
    labels = torch.ones(16, dtype=torch.int64)
    detections = {"boxes": boxes[None], "labels": labels[None], "scores": torch.arange(16, 0, -1)[None]}
    found = right_detections(detections, [(truth, torch.tensor([1, 1]))], 0.5)
    assert found[0].nonzero().flatten().tolist() == [0, 3]
    assert not right_detections({**detections, "labels": labels[None] * 0}, [(truth, torch.tensor([1, 1]))], 0.5).any()
