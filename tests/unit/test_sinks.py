"""W&B's settings and rows, and TensorBoard's files."""

import io
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch
from PIL import Image

from distlenet.config.loading import load_config
from distlenet.config.wandb_variables import with_wandb_variables
from distlenet.tasks.error_analysis import encode_png
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


RUN_SETTINGS = {"settings": {"optim.lr": 0.1, "optim.nesterov": True, "optim.name": "sgd", "data.size": None, "a": [1]}}


def read_events(run_dir):
    from tensorboard.backend.event_processing import event_accumulator

    return event_accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()


def hyperparameters(events, tag):
    from tensorboard.plugins.hparams import metadata

    content = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
    return getattr(metadata, f"parse_{tag}_plugin_data")(content)


def test_tensorboard_has_each_number_of_the_last_start_once(tmp_path):
    for losses in ([0.5, 0.4, 0.3], [0.5, 0.45]):
        board = TensorBoard(tmp_path, RUN_SETTINGS)
        for step, loss in enumerate(losses):
            board.put({"split": "train", "step": step, "time": 100.0 + step, "loss": loss, "slowest_host": "n1"})
        board.mark_replayed()
        board.finish("preempted", {}, {})
    events = read_events(tmp_path)
    assert events.Tags()["tensors"] == ["_hparams_/session_start_info", "train/loss"]  # and no end
    losses = events.Tensors("train/loss")
    assert [(event.step, event.wall_time) for event in losses] == [(0, 100.0), (1, 101.0)]
    assert [event.tensor_proto.float_val[0] for event in losses] == pytest.approx([0.5, 0.45])


@pytest.mark.parametrize(("outcome", "status"), [("finished", "STATUS_SUCCESS"), ("failed", "STATUS_FAILURE")])
def test_tensorboard_has_the_settings_and_the_outcome(tmp_path, outcome, status):
    from tensorboard.plugins.hparams import api_pb2 as api

    TensorBoard(tmp_path / "run", RUN_SETTINGS).finish(outcome, {"steps": 6}, {})
    start, end = (hyperparameters(read_events(tmp_path / "run"), f"session_{tag}_info") for tag in ("start", "end"))
    assert start.group_name == "run"
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}
    assert values == {"optim.lr": 0.1, "optim.nesterov": True, "optim.name": "sgd"}
    assert api.Status.Name(end.status) == status


def test_tensorboard_has_the_confusion_matrix_and_the_mistakes_as_images(tmp_path, monkeypatch):
    image = encode_png(torch.arange(12, dtype=torch.uint8).view(3, 4))
    mistakes = [{"index": i, "label": 0, "predicted": 1, "confidence": 0.9, "png": image} for i in range(7)]
    details = {"classes": [r"$\frac$", "dog"], "confusion": [[3, 7], [0, 1]], "mistakes": mistakes}

    def images(outcome, details):
        TensorBoard(tmp_path, RUN_SETTINGS).finish(outcome, {"steps": 6}, details)
        events = read_events(tmp_path)
        found = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if tag.startswith("test/")}
        for tag, (event,) in found.items():
            width, height, png = event.tensor_proto.string_val
            assert Image.open(io.BytesIO(png)).size == (int(width), int(height))
            assert (event.step, events.SummaryMetadata(tag).plugin_data.plugin_name) == (6, "images")
        return [*found]

    assert images("finished", details) == ["test/confusion", "test/most_confident_mistakes"]
    assert images("finished", {**details, "mistakes": []}) == ["test/confusion"]
    assert images("finished", {"of another": "task"}) == []
    assert images("failed", details) == []  # of an earlier, longer run
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # no matplotlib
    assert images("finished", details) == []


def test_the_figure_of_the_mistakes_shows_each_with_its_classes():
    from distlenet.tracking.figures import confusion_figure, mistakes_figure

    image = encode_png(torch.zeros(3, 4, dtype=torch.uint8))
    mistakes = [{"index": i, "label": 1, "predicted": 0, "confidence": 0.954, "png": image} for i in range(7)]
    details = {"classes": ["cat", "dog"], "confusion": [[3, 0], [7, 1]], "mistakes": mistakes}
    shown = [axes for axes in mistakes_figure(details).axes if axes.has_data()]
    assert [axes.get_title() for axes in shown] == [f"dog → cat\n95%, {i}" for i in range(7)]
    assert [text.get_text() for text in confusion_figure(details).axes[0].texts] == ["3", "7", "1"]
    many = {"classes": ["x"] * 51, "confusion": [[1] * 51] * 51}
    assert not confusion_figure(many).axes[0].texts


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
