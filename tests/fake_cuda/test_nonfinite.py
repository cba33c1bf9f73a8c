"""A loss that is not finite, in steps for which the host does not wait."""

import json

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda

WORDS = ("data.name=digits", "train.epochs=2", "train.global_batch_size=64", "precision=fp32", "optim.lr=0.03125")
WORDS += ("task.name=fake_cuda.poisoned_task:Poisoned", "train.log_every=20", "optim.schedule=constant")


def train(directory, device):
    ended = run("-m", "distlenet.train", *WORDS, f"device={device}", f"run.dir={directory}", "run.name=run")
    assert ended.status == 2
    (path,) = (directory / "run/diagnosis").glob("*.json")
    return ended.stderr.splitlines()[-1].replace(str(directory), ""), path.name, json.loads(path.read_text())


def test_replayed_steps_stop_at_the_first_bad_one_with_the_weights_before_it(tmp_path):
    """The diagnosis computes the step again, with the weights that are left: those of the CPU, which stops at once."""
    message, name, found = train(tmp_path / "gpu", "cuda")
    expected_message, expected_name, expected = train(tmp_path / "cpu", "cpu")
    assert message == expected_message
    assert name == expected_name
    assert found["step"] > 4  # some steps were replayed
    (gpu,), (cpu,) = found["ranks"], expected["ranks"]
    assert gpu["indices"] == cpu["indices"]
    # The losses of the finite samples. A fused optimizer on the GPU rounds otherwise: float32 over some steps.
    losses = [[sample["loss"] for sample in rank["worst"] if sample["loss"] != "nan"] for rank in (gpu, cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) > 3
