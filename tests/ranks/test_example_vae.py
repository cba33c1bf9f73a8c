"""The example of a variational autoencoder: trained for seconds from a copy of its directory, by the command line."""

import base64
import io
import json
import shutil

import pytest
from conftest import REPO
from forked import run_python, run_ranks
from PIL import Image

pytestmark = pytest.mark.ranks

SETTINGS = (
    "--config",
    "config.yaml",
    "data.name=digits",
    "device=cpu",
    "train.epochs=4",
    "train.global_batch_size=32",
    "task.args.hidden=32",
    "optim.lr=0.01",
    "distributed.reduction=exact",
    "distributed.virtual_shards=8",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A copy of the example, with a run on 1 rank and one on 2 ranks."""
    directory = tmp_path_factory.mktemp("example") / "vae"
    shutil.copytree(REPO / "examples/vae", directory)
    for ranks in (1, 2):
        run_ranks(ranks, "-m", "distlenet.train", *SETTINGS, f"run.name={ranks}", cwd=directory).succeeded()
    return directory


def evaluations(directory, ranks):
    records = map(json.loads, (directory / f"runs/{ranks}/metrics.jsonl").read_text().splitlines())
    names = ("step", "count", "loss", "reconstruction", "kl")
    return [[record[name] for name in names] for record in records if record["split"] == "test"]


def test_the_bound_improves_and_does_not_depend_on_the_ranks(directory):
    tests = evaluations(directory, 1)
    assert tests == evaluations(directory, 2)
    _, count, first, *_ = tests[0]
    _, _, last, reconstruction, kl = tests[-1]
    assert count == 360
    assert last < first - 5
    assert last == pytest.approx(reconstruction + kl, rel=1e-5)
    assert kl > 0.1  # the code is used


def test_the_report_has_drawn_images(directory):
    images = json.loads((directory / "runs/2/test.json").read_text())["images"]
    assert len(images) == 24
    drawn = [Image.open(io.BytesIO(base64.b64decode(image["png"]))) for image in images]
    assert {image.size for image in drawn} == {(32, 32)}
    assert len({image.tobytes() for image in drawn}) == 24


def test_images_are_drawn_with_the_network_of_a_run(directory):
    run_python("draw.py", "runs/1", "drawn.png", cwd=directory).succeeded()
    image = Image.open(directory / "drawn.png")
    assert image.size == (320, 320)
    low, high = image.getextrema()
    assert low < 30
    assert high > 200
