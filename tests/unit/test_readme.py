"""The example of a user's task in README works as it is written."""

import re

import pytest
from conftest import REPO
from forked import run_python, run_ranks

pytestmark = pytest.mark.unit


def test_the_task_of_the_readme_trains_on_two_ranks_and_is_evaluated(tmp_path):
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    (tmp_path / "spam.py").write_text(code)
    settings = ("task.name=spam:Spam", "device=cpu", "train.epochs=4")
    trained = run_ranks(2, "-m", "distlenet.train", *settings, cwd=tmp_path).succeeded()
    (directory,) = (tmp_path / "runs").glob("Spam-*")
    found = re.search(r"test accuracy (\d+\.\d+)% of 200", trained.stdout.splitlines()[-2] + trained.stdout)
    assert found, trained.stdout
    evaluated = run_python(
        "-m", "distlenet.evaluate", f"checkpoint={directory}", "task.name=spam:Spam", "--json", cwd=tmp_path
    ).succeeded()
    accuracy = float(re.search(r'"test_accuracy": ([\d.]+)', evaluated.stdout)[1])
    # The labels are a linear function of the inputs: a network that has learned nothing is right for half of them, with
    # a standard deviation of 3.5 % for 200 samples.
    assert accuracy > 0.8
