"""``model.compile=true`` with the compiler of torch: killed and resumed to the same bits. It compiles for minutes."""

from pathlib import Path

import pytest
import torch
from every_stop import differences, result
from forked import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(1500)]

PROGRAM = Path(__file__).with_name("rank_program.py")
SETTINGS = (
    "device=cpu",
    "data.name=digits",
    "train.global_batch_size=64",
    "train.max_steps=30",
    "train.epochs=2",
    "checkpoint.every_steps=4",
    "model.compile=true",
    "run.name=run",
)


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_compiled_run_killed_and_resumed_has_the_same_bits(tmp_path, reduction):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (*SETTINGS, f"distributed.reduction={reduction}", "distributed.virtual_shards=2")
    for directory in (whole, broken):
        directory.mkdir()
    run_ranks(2, PROGRAM, whole, *settings, f"run.dir={whole}", timeout=600).succeeded()
    died = run_ranks(2, PROGRAM, broken, "--die-at", 22, *settings, f"run.dir={broken}", timeout=600)
    assert died.status != 0, str(died)
    resumed = run_ranks(2, PROGRAM, broken, *settings, f"run.dir={broken}", timeout=600).succeeded()
    assert "resumed at step 20 of 30" in resumed.stdout, str(resumed)
    assert differences(list(result(whole)), list(result(broken))) == []
    names = torch.load(broken / "rank0.pt", weights_only=True)
    assert "conv1.weight" in names
