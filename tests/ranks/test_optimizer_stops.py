"""Optimizers, schedules, parameter groups, averaged and initial weights: a stop after any step changes no bit."""

from pathlib import Path

import pytest
import torch
from forked import run_python

from distlenet.models.lenet import Net

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(900)]

EVERY_STOP = Path(__file__).with_name("every_stop.py")
SETTINGS = (  # 155 images in batches of 16 are 10 steps per epoch; the last batch has 11
    "device=cpu",
    "data.name=synthetic",
    "data.synthetic_train=155",
    "data.synthetic_test=50",
    "data.augment=flip_shift",
    "train.global_batch_size=16",
    "train.epochs=2",
    "train.log_every=3",
    "optim.lr=0.05",
    "train.ema_decay=0.9",
    "checkpoint.every_steps=1",
)
BY_NAME = (
    "optim.name=torch.optim:NAdam",
    "optim.lr=0.002",
    "optim.args.betas=[0.9,0.95]",
    "optim.schedule=torch.optim.lr_scheduler:StepLR",
    "optim.schedule_args.step_size=3",
    "optim.schedule_args.gamma=0.5",
    "distributed.reduction=exact",
    "distributed.virtual_shards=8",
)


@pytest.mark.parametrize("more", [("optim.no_decay=true", "train.max_grad_norm=1"), BY_NAME], ids=["groups", "by name"])
def test_stop_after_any_step_does_not_change_the_result(tmp_path, more):
    torch.manual_seed(5)
    torch.save(Net().state_dict(), tmp_path / "weights.pt")
    settings = (*SETTINGS, *more, f"checkpoint.init_from={tmp_path / 'weights.pt'}")
    ended = run_python(EVERY_STOP, tmp_path, *settings, timeout=800).succeeded()
    assert ended.stdout == "19 stops, all equal\n"
