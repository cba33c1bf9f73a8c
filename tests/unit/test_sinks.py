"""W&B's settings and rows, and TensorBoard's files."""

from pathlib import Path
from unittest.mock import MagicMock, call

import pytest

from distlenet.config.loading import load_config
from distlenet.config.wandb_variables import with_wandb_variables
from distlenet.tracking.tensorboard import TensorBoard
from distlenet.tracking.wandb import Wandb, base_url, has_key, row, row_number, wandb_mode
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_auto_mode_follows_the_environment_then_the_key(tmp_path):
    home = {"HOME": str(tmp_path)}
    assert wandb_mode("auto", home) == "offline"
    assert wandb_mode("auto", {**home, "WANDB_API_KEY": "x"}) == "online"
    assert wandb_mode("auto", {**home, "WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}) == "disabled"
    assert wandb_mode("online", {**home, "WANDB_MODE": "disabled"}) == "online"


@pytest.mark.parametrize(
    ("value", "mode"),
    [("dryrun", "offline"), ("Disabled", "disabled"), ("ONLINE", "online"), ("run", "online"), ("", "online")],
)
def test_values_of_wandb_mode(value, mode):
    assert wandb_mode("auto", {"WANDB_MODE": value, "WANDB_API_KEY": "x" * 40}) == mode


def test_an_invalid_wandb_mode_is_an_error():
    with pytest.raises(UserError, match="WANDB_MODE=shared: expected online, offline or disabled"):
        wandb_mode("auto", {"WANDB_MODE": "shared"})


def test_a_key_in_netrc_is_valid_only_for_its_host(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key({"HOME": str(tmp_path)})
    assert not has_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / ".netrc").write_text("machine\n")  # incomplete
    assert not has_key({"HOME": str(tmp_path)})


def test_a_key_can_be_in_the_file_that_netrc_names(tmp_path):
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key({"HOME": str(tmp_path), "NETRC": str(tmp_path / "keys")})


def test_unusual_configurations_of_keys(tmp_path, monkeypatch):
    home = {"HOME": str(tmp_path)}
    (tmp_path / ".netrc").write_bytes(b"machine \xff login x password y\n")
    assert not has_key(home)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40 + "\n")
    assert has_key(home)
    assert not has_key({**home, "WANDB_BASE_URL": "http://[::1"})
    (tmp_path / ".config/wandb").mkdir(parents=True)
    (tmp_path / ".config/wandb/settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert not has_key(home)  # wandb login --host chose another server than the key's
    assert base_url({**home, "WANDB_BASE_URL": "http://localhost"}) == "http://localhost"
    (tmp_path / ".netrc").write_text("machine wandb.example login user password " + "k" * 40 + "\n")
    assert has_key(home)
    (tmp_path / ".config/wandb/settings").write_bytes(b"no ini file \xff")
    assert base_url(home) == "https://api.wandb.ai"
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not has_key({})


def test_a_replay_does_not_replace_the_environment_of_the_run(tmp_path, monkeypatch):
    config = load_config([], ["wandb.mode=offline"]).to_dict()
    run_info = {"run_id": "abc", "version": "1", "world_size": 2, "hosts": ["n2", "n1", "n2"]}
    run_info |= {"backend": "gloo", "device": "cpu", "precision": "fp32"}
    calls = []
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append(arguments) or MagicMock())
    for info in (run_info, {"run_id": "abc", "complete": True}):  # the second as in a replay
        Wandb(tmp_path, config, info, "offline")
    first, replayed = (call["config"] for call in calls)
    assert (first["environment"]["hosts"], first["environment"]["world_size"]) == (["n1", "n2"], 2)
    assert replayed == config


def test_rows_are_numbered_by_step_and_split():
    splits = ("train", "train_epoch", "val", "test")
    numbers = [row_number({"step": step, "split": split}) for step in (0, 1, 2) for split in splits]
    assert numbers == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13]


@pytest.mark.parametrize(("summary", "kind"), [({"best_step": 4}, "best"), ({}, "last")])
def test_the_best_checkpoint_is_uploaded_or_without_a_validation_set_the_last(tmp_path, monkeypatch, summary, kind):
    config = load_config([], ["wandb.mode=offline", "wandb.log_checkpoints=true"]).to_dict()
    run = MagicMock(step=0)
    monkeypatch.setattr("wandb.init", lambda **_: run)
    (tmp_path / "checkpoints").mkdir()
    for name in ("best.pt", "last.pt"):  # an earlier version may have written a best.pt without a validation set
        (tmp_path / "checkpoints" / name).touch()
    Wandb(tmp_path, config, {"run_id": "abc", "complete": True}, "offline").finish("finished", summary, {})
    path = str(tmp_path / f"checkpoints/{kind}.pt")
    assert run.log_artifact.call_args_list == [call(path, name=f"{tmp_path.name}-{kind}", type="model")]


def test_the_keys_of_a_row_name_the_split_and_null_values_are_omitted():
    record = {"split": "train", "step": 50, "epoch": 2, "batch": 3, "loss": 0.25, "accuracy": None, "slowest_host": "n"}
    assert row(record) == {"step": 50, "epoch": 2, "train/batch": 3, "train/loss": 0.25, "train/slowest_host": "n"}


def test_tensorboard_has_each_number_of_the_last_start_once(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for losses in ([0.5, 0.4, 0.3], [0.5, 0.45]):
        board = TensorBoard(tmp_path)
        for step, loss in enumerate(losses):
            board.put({"split": "train", "step": step, "time": 100.0 + step, "loss": loss, "slowest_host": "n1"})
        board.mark_replayed()
        board.finish("finished", {}, {})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["tensors"] == ["train/loss"]
    losses = events.Tensors("train/loss")
    assert [(event.step, event.wall_time) for event in losses] == [(0, 100.0), (1, 101.0)]
    assert [event.tensor_proto.float_val[0] for event in losses] == pytest.approx([0.5, 0.45])


def test_settings_then_variables_name_project_and_entity(tmp_path):
    environ = {"WANDB_PROJECT": "vision", "WANDB_ENTITY": "team"}

    def names(environ, *settings):
        wandb = with_wandb_variables(load_config([], settings), environ).wandb
        return wandb.project, wandb.entity

    assert names({}) == names({"WANDB_PROJECT": "", "WANDB_ENTITY": ""}) == ("distlenet", None)
    assert names(environ) == ("vision", "team")
    assert names(environ, "wandb.project=mine", "wandb.entity=me") == ("mine", "me")


def test_variables_name_the_tags_and_the_group_of_a_run_without_such_settings(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("wandb.init", lambda **arguments: calls.append(arguments) or MagicMock())
    for settings in ([], ["wandb.tags=[try]"]):
        Wandb(tmp_path, load_config([], settings).to_dict(), {"run_id": "abc", "complete": True}, "offline")
    assert [call["tags"] for call in calls] == [None, ["try"]]  # with None, the client reads WANDB_TAGS
