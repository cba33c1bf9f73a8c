"""What a new user tries first: a network, data and a task in the current directory, outside the repository.

Nothing of the package is edited. The images are random: the network learns nothing that its code must not.
"""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_python, run_ranks
from PIL import Image

pytestmark = pytest.mark.ranks

NET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return torch.relu(x + self.layers(x))


class Net(nn.Module):
    \"\"\"A small ResNet, which accepts images of one size only.\"\"\"

    def __init__(self, classes, channels=3, size=(20, 24)):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=4), nn.BatchNorm2d(8), Block(8))
        self.head = nn.Linear(8 * ((size[0] + 1) // 4) * ((size[1] + 1) // 4), classes)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.reshape(x.size(0), -1))
"""

TASK = """
from distlenet import ImageClassification


class Mine(ImageClassification):
    eval_batch_size = 8  # 36 test images: both ranks have some
    factor = 1.0

    def loss(self, model, data):
        losses, logits = super().loss(model, data)
        return self.factor * losses, logits

    def metrics(self, outputs, data):
        found = (outputs.topk(2, dim=1).indices == data[1].unsqueeze(1)).any(1)
        return {**super().metrics(outputs, data), "top2": found}
"""

DATA = """
from pathlib import Path

from PIL import Image

from distlenet import Datasets


class Files:
    def __init__(self, directory):
        self.paths = sorted(Path(directory).glob("*/*.png"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        return Image.open(path), int(path.parent.name[1:])


def colors(root):
    return Datasets(Files(f"{root}/train"), Files(f"{root}/test"), classes=["c0", "c1", "c2"])
"""

PREDICT = """
import json
import sys

import numpy as np
import torch
from PIL import Image

from distlenet import Datasets, ImageClassification, Task, evaluate, load_config, load_model, train
from my_task import Mine

names = ["model.name=my_net:Net"]
net = load_model("runs/run", Mine, names)
images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in sys.argv[1:]]
with torch.no_grad():
    batches = torch.stack(images).split(Mine.eval_batch_size)
    probabilities = torch.cat([net(batch).softmax(1) for batch in batches])
print(json.dumps([probabilities.tolist(), evaluate("runs/run", names, make_task=Mine)]))
"""

COMMON = ("device=cpu", "wandb.mode=disabled", "train.global_batch_size=16", "optim.lr=0.02")
NETWORK = ("model.name=my_net:Net", "model.args.classes=3")
NAMES = ("model.name=my_net:Net", "task.name=my_task:Mine")
FOLDER = ("data.name=folder", "data.root=images", "data.augment=flip_shift", *COMMON, *NETWORK)
# Top-2 accuracy of 12 images has 13 values, so the run ends in epoch 14 at the latest.
WHOLE = (
    *FOLDER,
    "task.name=my_task:Mine",
    "data.validation=0.2",
    "train.ema_decay=0.5",
    "train.stop_when=val/top2",
    "train.stop_patience=1",
    "train.epochs=30",
    "run.name=run",
)


def write_images(root: Path, mode: str, size: tuple[int, int], **counts: int) -> None:
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            path = root / split / f"c{number % 3}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The user's directory, after a training on two ranks with everything in one run."""
    directory = tmp_path_factory.mktemp("open") / "project"
    directory.mkdir()
    for name, text in (("my_net", NET), ("my_task", TASK), ("my_data", DATA), ("predict_all", PREDICT)):
        (directory / f"{name}.py").write_text(text)
    write_images(directory / "images", "RGB", (24, 20), train=60, test=36)
    write_images(directory / "grey", "L", (64, 64), train=16, test=5)
    run_ranks(2, "-m", "distlenet.train", *WHOLE, cwd=directory).succeeded()
    return directory


def train(project: Path, *words: str, ranks: int = 1):
    return run_ranks(ranks, "-m", "distlenet.train", *words, cwd=project)


def error_of(project: Path, *words: str) -> str:
    """Return the one line of a training that must end with status 2."""
    ran = train(project, *words)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("distlenet: ")]  # not the warnings of runpy
    assert (ran.status, len(lines)) == (2, 1), str(ran)
    return lines[0]


def results(project: Path, run: str = "run") -> dict:
    return json.loads((project / f"runs/{run}/summary.json").read_text())


def test_validation_average_early_stopping_and_a_metric_in_one_run(project):
    found = results(project)
    assert found["stopped_early"]
    assert found["epochs"] <= 14
    assert {"val_top2", "test_top2", "test_accuracy"} <= found.keys()
    state = torch.load(project / "runs/run/checkpoints/best.pt", weights_only=True)
    assert "ema" in state
    details = json.loads((project / "runs/run/test.json").read_text())
    assert sum(map(sum, details["confusion"])) == 36
    with Image.open(io.BytesIO(base64.b64decode(details["mistakes"][0]["png"]))) as mistake:
        assert (mistake.mode, mistake.size) == ("RGB", (24, 20))


def test_the_logged_test_metrics_are_those_of_the_last_checkpoint(project):
    words = ("-m", "distlenet.evaluate", "--json", "checkpoint=runs/run", *NAMES)
    evaluated = json.loads(run_ranks(2, *words, cwd=project).succeeded().stdout)
    records = [json.loads(line) for line in (project / "runs/run/metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["split"] == "test"][-1]
    for name in ("loss", "accuracy", "top2", "count"):
        assert evaluated[f"test_{name}"] == last[name], name


def test_predictions_are_those_of_the_evaluation(project, tmp_path):
    """Images of the test set, and others: grey, of another size, and of other proportions."""
    others, same = tmp_path / "others", tmp_path / "same"
    others.mkdir()
    same.mkdir()
    first = Image.open(project / "images/test/c0/000.png")
    wide = np.full((10, 24), 7, np.uint8)
    wide[3:6, 9:15] = 200
    padded = np.full((20, 24), 7, np.uint8)
    padded[5:15] = wide
    large = first.resize((48, 40), Image.Resampling.NEAREST)
    for name, image, expected in (
        ("grey", first.convert("L"), first.convert("L")),
        ("large", large, large.resize((24, 20), Image.Resampling.BOX)),
        ("wide", Image.fromarray(wide), Image.fromarray(padded)),
    ):
        image.save(others / f"{name}.png")
        expected.convert("RGB").save(same / f"{name}.png")
    words = ("-m", "distlenet.predict", "checkpoint=runs/run", *NAMES)
    figure = tmp_path / "figure.png"
    ended = run_python(*words, "images/test", others, "--json", "--save", figure, cwd=project).succeeded()
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    tests = sorted((project / "images/test").rglob("*.png"))
    assert [Path(answer["image"]).name for answer in answers] == [
        *(path.name for path in tests),
        *("grey.png", "large.png", "wide.png"),
    ]
    ended = run_python("predict_all.py", *tests, *sorted(same.iterdir()), cwd=project).succeeded()
    probabilities, evaluated = json.loads(ended.stdout)
    assert evaluated["test_top2"] == results(project)["test_top2"]
    for answer, expected in zip(answers, probabilities, strict=True):
        found = {each["label"]: each["probability"] for each in answer["top"]}
        assert [found[label] for label in range(3)] == expected, answer["image"]
    confusion = json.loads((project / "runs/run/test.json").read_text())["confusion"]
    labels = [answer["top"][0]["label"] for answer in answers[:36]]
    assert [labels.count(label) for label in range(3)] == [sum(row[label] for row in confusion) for label in range(3)]
    assert Image.open(figure).width > 500
    table = run_python(*words, others, "--top", "1", cwd=project).succeeded().stdout.splitlines()
    best = answers[36]["top"][0]
    assert table[0].split() == [str(others / "grey.png"), best["class"], f"{best['probability']:.1%}"]


def test_exact_accepts_the_network_and_the_images_of_a_function(project):
    data = ("data.name=my_data:colors", "data.args.root=images")
    exact = ("distributed.reduction=exact", "distributed.virtual_shards=2")
    train(project, *COMMON, *NETWORK, *data, *exact, "train.max_steps=3", "run.name=exact", ranks=2).succeeded()
    assert (results(project, "exact")["steps"], results(project, "exact")["test_count"]) == (3, 36)
    state = torch.load(project / "runs/exact/checkpoints/last.pt", weights_only=True)
    assert (state["task"]["channels"], state["task"]["size"]) == (3, [20, 24])


def test_large_grey_images_are_used_completely_or_refused(project):
    data = ("data.name=folder", "data.root=grey", *COMMON, "train.epochs=1", "run.name=grey")
    error = error_of(project, *data)
    assert "takes grey images of at most 32×32 pixels, but these have 64×64; give data.size=32" in error
    train(project, *data, *NETWORK, "model.args={channels: 1, size: [64, 64]}").succeeded()
    assert results(project, "grey")["test_count"] == 5


def test_changed_code_or_data_is_named_and_the_run_is_not_called_complete(project, tmp_path):
    copy = shutil.copytree(project, tmp_path / "copy")
    (copy / "my_task.py").write_text(TASK.replace("factor = 1.0", "factor = 2.0"))
    assert "the code is not that of the checkpoint: my_task (" in error_of(copy, *WHOLE)
    (copy / "my_task.py").write_text(TASK)
    write_images(copy / "other", "RGB", (24, 20), train=63, test=36)
    assert "the data is not that of the checkpoint: train (60 files" in error_of(copy, *WHOLE, "data.root=other")
    assert "this run is complete" in train(copy, *WHOLE).succeeded().stdout


def test_a_directory_of_images_is_not_replaced_by_another_data_set(project):
    error = error_of(project, *COMMON, "data.root=images", "train.max_steps=1")
    assert "data.name=fashion_mnist: its four IDX files (plain or .gz) are not in images, images/Fashion" in error
    assert "contains images: for a directory per class, give data.name=folder" in error
