import os
import re

import pytest
import torch

from distlenet import checkpoint
from distlenet.checkpoint import (
    CheckpointFolder,
    check_same_settings,
    choose_resumable,
    find_checkpoint,
    load_checkpoint,
    load_model,
    write_atomically,
)
from distlenet.config import load_config
from distlenet.errors import UserError
from distlenet.net import Net

pytestmark = pytest.mark.unit


def state(step: int, *overrides: str, net: torch.nn.Module | None = None):
    model = (net or Net()).state_dict()
    return {"model": model, "step": step, "epoch": 0, "config": load_config([], overrides).to_dict()}


def test_the_newest_k_and_the_best_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.newest() is None
    for step in (5, 10, 99, 100, 1000, 123456789):
        folder.save(state(step), best=step == 10)
    names = sorted(path.name for path in folder.folder.iterdir())
    assert names == ["best.pt", "step-00001000.pt", "step-123456789.pt"]
    assert folder.newest().name == "step-123456789.pt"  # by step, not by name
    assert load_checkpoint(folder.folder / "best.pt")["step"] == 10


def test_the_tutorials_code_reads_a_checkpoint(tmp_path):
    net = Net()
    write_atomically(state(1, net=net), tmp_path / "c.pt")
    fresh = Net()
    fresh.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)["model"])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("fails_in", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails_in):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(state(1), best=False)
    before = (tmp_path / "step-00000001.pt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    module, name = fails_in.split(".")
    monkeypatch.setattr(getattr(checkpoint, module), name, fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        folder.save(state(2), best=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert (tmp_path / "step-00000001.pt").read_bytes() == before


def test_checkpoints_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(state(1), tmp_path / "c.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o640


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload(), "step": 1, "epoch": 0, "config": {}}, "evil.pt")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        load_checkpoint(checkpoint.Path("evil.pt"))
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"root:x:0:0", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoint_are_named(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(path)


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "c.pt"
    write_atomically(state(1), path)
    whole = path.read_bytes()
    for share in range(0, 100, 5):
        path.write_bytes(whole[: len(whole) * share // 100])
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_checkpoint(path)


def test_another_architecture_is_refused_naming_what_differs(tmp_path):
    other = Net()
    other.fc3 = torch.nn.Linear(84, 100)
    del other.conv1
    other.extra = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(UserError) as error:
        load_model(Net(), state(1, net=other), tmp_path / "c.pt")
    for part in ("another architecture", "conv1.bias", "extra.weight", "fc3.weight (100, 84) instead of (10, 84)"):
        assert part in str(error.value)


def test_finding_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no such file or run folder"):
        find_checkpoint(run)
    run.mkdir()
    with pytest.raises(UserError, match="holds no checkpoints"):
        find_checkpoint(run)
    folder = CheckpointFolder(run / "checkpoints", keep=3)
    folder.save(state(7), best=True)
    newest = folder.save(state(8), best=False)
    assert find_checkpoint(run) == find_checkpoint(folder.folder) == newest
    assert find_checkpoint(folder.folder / "best.pt") == folder.folder / "best.pt"


def test_resuming_takes_the_newest_a_given_one_or_none(tmp_path):
    own = CheckpointFolder(tmp_path / "own/checkpoints", keep=3)
    other = CheckpointFolder(tmp_path / "other/checkpoints", keep=3).save(state(5), best=False)
    assert choose_resumable(load_config(), own, Net()) is None
    assert choose_resumable(load_config([], ["checkpoint.resume=never"]), own, Net()) is None
    given = load_config([], [f"checkpoint.resume={tmp_path / 'other'}"])
    assert choose_resumable(given, own, Net())[0] == other
    newest = own.save(state(9), best=False)
    assert choose_resumable(load_config(), own, Net())[0] == newest
    for config in (given, load_config([], ["checkpoint.resume=never"])):
        with pytest.raises(UserError, match=r"already holds step-00000009\.pt"):
            choose_resumable(config, own, Net())


def test_settings_that_change_the_result_are_refused_others_pass(tmp_path):
    saved = state(1)
    harmless = ["run.name=x", "data.workers=3", "train.log_every=1", "device=cpu", "train.accumulation_steps=2"]
    check_same_settings(saved, load_config([], harmless), tmp_path)
    changed = ["seed=1", "optim.lr=0.5"]
    with pytest.raises(UserError) as error:
        check_same_settings(saved, load_config([], changed), tmp_path)
    assert "seed (was 0, now 1), optim.lr (was 0.2, now 0.5)" in str(error.value)
    assert "checkpoint.allow_changed=[seed,optim.lr]" in str(error.value)
    check_same_settings(saved, load_config([], [*changed, "checkpoint.allow_changed=[seed,optim.lr]"]), tmp_path)
