"""Each recipe and each example trains in a CUDA graph: captured, replayed, without a line that is not ours."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import REPO
from test_examples import EXAMPLES

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

PROGRAM = Path(__file__).parent / "training_program.py"
SETTINGS = ("device=cuda", "train.cuda_graph=auto", "run.name=run", "run.report=never", "distributed.backend=auto")
STEPS = "train.max_steps=15"  # some before the capture, some replayed
RAGGED = ("detection", "spam")  # each batch has other shapes


def assert_replayed(ended):
    ended.succeeded()
    (report,) = [line for line in ended.stdout.splitlines() if line.startswith("report ")]
    counts = json.loads(report.partition(" ")[2])
    assert counts.get("capture", 0) >= 1, ended
    assert counts.get("graph launch", 0) >= 3, ended
    assert not [line for line in ended.stderr.splitlines() if line], ended.stderr


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (REPO / "configs").glob("*.yaml")))
def test_recipe(tmp_path, recipe):
    """On the digits, of which an epoch has more steps than the test takes."""
    words = ("--config", REPO / f"configs/{recipe}.yaml", *SETTINGS, STEPS, "data.name=digits", f"run.dir={tmp_path}")
    if recipe != "tutorial":
        words += ("train.global_batch_size=64",)
    assert_replayed(run(PROGRAM, *words))


@pytest.mark.parametrize("name", sorted({example.directory for example in EXAMPLES.values()}))
def test_example(tmp_path, name):
    example, directory = EXAMPLES[name], tmp_path / "example"
    shutil.copytree(REPO / "examples" / name, directory)
    example.make_data(directory)
    words = ("--config", example.config, *SETTINGS, *example.settings, STEPS, "train.epochs=10")
    if name == "resnet_folder":
        words += ("train.global_batch_size=8",)  # its convolutions take most of the test's time
    ended = run(PROGRAM, *words, cwd=directory)
    if name in RAGGED:
        (reason,) = ended.succeeded().stderr.splitlines()
        assert reason.startswith("distlenet: train.cuda_graph=auto: ")
    else:
        assert_replayed(ended)
