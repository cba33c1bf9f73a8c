"""Names in settings: module:attribute of the user's code, its arguments, and who may cause an import."""

import json
import sys

import pytest
from conftest import run_command
from forked import run_python
from torch import nn

from distlenet.config.loading import (
    identity,
    load_config,
    run_directory,
    settings_to_save,
    to_yaml,
    warn_of_unused_settings,
)
from distlenet.config.names import check_arguments, resolve
from distlenet.config.schema import ModelConfig
from distlenet.models.networks import make_model
from distlenet.task import Task, datasets_of, new_model
from distlenet.tasks.image_classification import ImageClassification
from distlenet.tasks.registry import create_task, make_task
from distlenet.train import train
from distlenet.training.dry_run import plan
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

USER_CODE = """
import pathlib

from torch import nn

from distlenet import Datasets, ImageClassification

pathlib.Path("imported").touch()


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(1024, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, x):
        return self.layers(x)


class Halved(ImageClassification):
    def __init__(self, config, factor):
        super().__init__(config)
        self.factor = factor

    def loss(self, model, data):
        losses, outputs = super().loss(model, data)
        return self.factor * losses, outputs


number = 3
"""

DIGITS = ("data.name=digits", "device=cpu", "train.max_steps=2", "wandb.mode=disabled", "run.name=run")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A current directory with a user's module of a name that no other test has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"code_{tmp_path.name}.py").write_text(USER_CODE)
    return tmp_path


def module_of(directory):
    return f"code_{directory.name}"


def test_a_network_is_made_from_a_name_and_arguments(directory):
    settings = [f"model.name={module_of(directory)}:Net", "model.args.width=7"]
    model = make_model(load_config([], settings).model)
    assert model.layers[1].out_features == 7
    file = directory / "settings.yaml"
    file.write_text(f"model:\n  name: {module_of(directory)}:Net\n  args: {{width: 3, depth: 2}}\n")
    config = load_config([str(file)], ["model.args.width=5"])
    assert config.model.args == {"width": 5, "depth": 2}
    assert load_config([], ["model.args={a: [1, null, {b: x}]}"]).model.args == {"a": [1, None, {"b": "x"}]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none_such:Net", "there is no module none_such; start in the directory that contains it"),
        ("torch.nn:Linaer", "torch.nn has no attribute Linaer; did you mean Linear?"),
        ("torchvision.models:resnet99", "has no attribute resnet99; did you mean resnet50?"),  # not resnet, a module
        ("{module}:number", "is a int; expected a class or a function"),
        ("{module}:Something", "has no attribute Something; it defines Net, Halved"),
        ("broken:Net", "importing broken failed: ZeroDivisionError"),
        ("exits:Net", "importing exits failed: SystemExit: 0 ("),
        ("needs_more:Net", "importing needs_more failed: ModuleNotFoundError: No module named 'none_such'"),
    ],
)
def test_a_name_that_cannot_be_used_is_an_error_of_one_line(directory, name, message):
    (directory / "broken.py").write_text("\n\n1 / 0\n")
    (directory / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (directory / "needs_more.py").write_text("import none_such\n")
    with pytest.raises(UserError) as raised:
        resolve("model.name", name.format(module=module_of(directory)), {})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    if name.startswith("broken"):
        assert "broken.py, line 3" in str(raised.value)


def test_arguments_are_checked_against_the_signature():
    def function(config, width, *, depth=2):
        return config, width, depth

    check_arguments("task.args", function, {"width": 1}, positional=1)
    for args in ({}, {"width": 1, "heigth": 2}):
        with pytest.raises(UserError, match=r"^task\.args: .*function: .*; it accepts width, depth=2$"):
            check_arguments("task.args", function, args, positional=1)
    with pytest.raises(UserError, match=r"model\.args: Net: .*; it accepts none"):
        make_model(ModelConfig(args={"width": 3}))


def test_an_argument_that_the_network_refuses_is_named(directory):
    """torchvision's functions pass any argument on, so their signatures accept it."""
    settings = ["model.name=torchvision.models:resnet18", "model.args.num_class=5"]
    with pytest.raises(
        UserError, match=r"model\.args: resnet18\(num_class=5\) failed: TypeError: .*'num_class'.*, line"
    ):
        make_model(load_config([], settings).model)
    with pytest.raises(UserError, match=r"Net\(width='a'\) failed: TypeError: .* \(.*torch.*, line \d+\); change"):
        make_model(load_config([], [f"model.name={module_of(directory)}:Net", "model.args.width=a"]).model)


def test_a_module_that_does_not_exist_is_found_before_the_ranks_meet(monkeypatch):
    monkeypatch.setattr("distlenet.train.init_distributed", lambda *_: pytest.fail("too late"))
    for name in ("task.name=none_such:Task", "optim.name=none.such:Optim", "data.name=none_such:data"):
        with pytest.raises(UserError, match=rf"{name}: there is no module none"):
            train(load_config([], [name]))


def test_what_is_no_network_or_no_task_is_refused():
    with pytest.raises(UserError, match=r"returned a dict; expected a torch\.nn\.Module"):
        make_model(ModelConfig(name="builtins:dict"))
    with pytest.raises(UserError, match=r"returned a SimpleNamespace; expected a distlenet\.Task"):
        make_task(load_config([], ["task.name=tests_of_names:Nothing"]))
    with pytest.raises(UserError, match="does not define datasets, loss, model; add each of these methods"):
        make_task(load_config([], ["task.name=distlenet:Task"]))


class NotTask:
    pass


class Plain(Task):
    def model(self):
        return None

    def datasets(self):
        return [], []

    def loss(self, model, data):
        return None


class NoConfig(Plain):
    def __init__(self):
        super().__init__(None)


class NoSuper(Plain):
    def __init__(self, config):
        self.width = 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NotTask", "is not a subclass of distlenet.Task"),
        ("NoConfig", "__init__ must accept config as its first argument"),
        ("NoSuper", "has no config; call super().__init__(config) in NoSuper.__init__"),
    ],
)
def test_a_class_that_cannot_be_a_task_is_refused(name, message):
    config = load_config([], [f"task.name={__name__}:{name}"])
    with pytest.raises(UserError) as error:
        make_task(config)
    assert str(error.value) == f"task.name={__name__}:{name}: {message}"
    with pytest.raises(UserError) as error:
        create_task(globals()[name], config)
    assert str(error.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (new_model, "Plain.model: returned a NoneType; expected a torch.nn.Module"),
        (datasets_of, "Plain.datasets: returned a tuple; expected distlenet.Datasets"),
    ],
)
def test_what_a_hook_returns_is_checked(function, message):
    with pytest.raises(UserError) as error:
        function(Plain(load_config()))
    assert str(error.value) == message


@pytest.mark.parametrize("methods", [{"model": Plain.model}, {"datasets": Plain.datasets}])
def test_training_and_a_dry_run_check_what_a_hook_returns(methods, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = type("Mine", (ImageClassification,), methods)
    config = load_config([], DIGITS)
    for run in (lambda: train(config, task), lambda: plan(config, 2, task)):
        with pytest.raises(UserError, match=r"^Mine\.\w+: returned a \w+; expected"):
            run()


@pytest.fixture(autouse=True)
def module_without_a_task(monkeypatch):
    from types import ModuleType, SimpleNamespace

    module = ModuleType("tests_of_names")
    module.Nothing = lambda _: SimpleNamespace()
    monkeypatch.setitem(sys.modules, "tests_of_names", module)


@pytest.mark.parametrize("value", ["lenett", "a.b.c", "a:b:c", "a b:c", "../a:b", "a/b:c", ":b", "a:"])
def test_what_is_no_name_is_refused(value):
    with pytest.raises(UserError, match=r"expected lenet or MODULE:ATTRIBUTE"):
        load_config([], [f"model.name={value}"])


@pytest.mark.parametrize("value", ["3", "[1]", "{a b: 1}", "{a: .nan}", "{1: 2}", "null"])
def test_what_is_no_mapping_of_arguments_is_refused(value):
    with pytest.raises(UserError, match=r"expected a mapping of arguments"):
        load_config([], [f"model.args={value}"])


def test_names_and_arguments_name_the_run():
    names = {
        run_directory(load_config([], settings)).name
        for settings in ([], ["model.name=a:B"], ["model.name=a:B", "model.args.width=1"])
    }
    assert len(names) == 3
    assert run_directory(load_config([], ["task.name=my.tasks:Spam"])).name.startswith("Spam-")
    assert run_directory(load_config([], ["data.name=my.data:flowers"])).name.startswith("flowers-")


def test_the_directory_of_a_function_is_no_part_of_the_name():
    names = {
        identity(load_config([], ["data.name=a:b", *more]))
        for more in ([], ["data.args.root=x"], ["data.args.root=y"], ["data.root=z"])
    }
    assert len(names) == 1
    assert identity(load_config([], ["data.name=a:b", "data.args.size=3"])) not in names


def test_a_file_does_not_replace_what_the_checkpoint_was_trained_with(tmp_path, capsys):
    base = load_config([], ["model.name=a:B", "model.args={width: 1, depth: 2}", "data.size=7"]).to_dict()
    file = tmp_path / "settings.yaml"
    file.write_text(
        "model: {name: a:B, args: {width: 3}}\ndata: {size: 7, root: elsewhere}\ntrain: {epochs: 1}\noptim: {lr: 0.1}\n"
    )
    overrides = ["optim.lr=0.3"]
    config = load_config([str(file)], overrides, base, ["model.name"])
    assert (config.model.name, config.model.args, config.data.root) == ("a:B", {"width": 1, "depth": 2}, "elsewhere")
    assert (config.train.epochs, config.optim.lr) == (8, 0.3)
    warn_of_unused_settings([str(file)], overrides, base)
    assert capsys.readouterr().err == (
        "distlenet: --config: model.args={'width': 3} (in the checkpoint {'width': 1, 'depth': 2}), "
        "train.epochs=1 (in the checkpoint 8): not used, since the checkpoint differs; key=value replaces one\n"
    )
    file.write_text("model: {name: c:D, args: {width: 3}}\n")
    assert load_config([str(file)], [], base, ["model.name"]).model.args == {"width": 3}  # of another network
    file.write_text("model: {name: a:B, args: {depth: 2}}\ndata: {size: 7}\n")
    warn_of_unused_settings([str(file)], [], base)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("reduction", ["ddp", "exact"])
def test_the_settings_of_a_run_agree_with_its_checkpoint(tmp_path, capsys, reduction):
    """The file has virtual_shards=auto, the checkpoint the number."""
    config = load_config([], [f"distributed.reduction={reduction}", "train.global_batch_size=2"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    warn_of_unused_settings([str(tmp_path / "config.yaml")], [], settings_to_save(config))
    assert capsys.readouterr().err == ""


def test_the_directory_of_a_checkpoint_is_not_that_of_a_function():
    base = load_config([], ["data.name=folder", "data.root=images"]).to_dict()
    assert load_config([], ["data.name=a:b"], base, ["data.name"]).data.root == "data"
    assert load_config([], ["data.name=tar"], base, ["data.name"]).data.root == "images"


def test_a_file_gives_the_directory_of_a_function(tmp_path, capsys):
    base = load_config([], ["data.name=a:b", "data.args={root: there, size: 3}"]).to_dict()
    file = tmp_path / "settings.yaml"
    file.write_text("data: {name: a:b, args: {root: here, size: 3}}\n")
    assert load_config([str(file)], [], base, ["data.name"]).data.args == {"root": "here", "size": 3}
    warn_of_unused_settings([str(file)], [], base)
    assert capsys.readouterr().err == ""
    file.write_text("data: {name: a:b, args: {root: here, size: 4}}\n")
    assert load_config([str(file)], [], base, ["data.name"]).data.args == {"root": "here", "size": 3}
    warn_of_unused_settings([str(file)], [], base)
    assert "data.args={'size': 4} (in the checkpoint {'size': 3})" in capsys.readouterr().err


def test_a_checkpoint_cannot_name_code():
    base = load_config([], ["task.name=evil:Task", "optim.name=evil:Optim", "optim.args.x=1"]).to_dict()
    with pytest.raises(
        UserError, match=r"made with task.name=evil:Task; code is never imported .*: add task.name=evil:Task"
    ):
        load_config(base=base, used_names=["task.name"])
    with pytest.raises(UserError, match=r"add task.name=evil:Task optim.name=evil:Optim, if you trust it"):
        load_config(base=base, used_names=["task.name", "model.name", "optim.name"])
    unused = load_config(base=base)
    assert (unused.task.name, unused.optim.name) == ("image_classification", "sgd")
    assert load_config([], ["task.name=good:Task"], base, ["task.name"]).task.name == "good:Task"


def test_arguments_of_a_checkpoint_belong_to_its_name():
    base = load_config([], ["model.name=a:B", "model.args.width=1"]).to_dict()
    assert load_config([], ["model.name=lenet"], base).model.args == {}
    assert load_config([], ["model.name=a:B", "model.args.depth=2"], base).model.args == {"width": 1, "depth": 2}


def command(directory, module, *words):
    return run_python("-m", f"distlenet.{module}", *words, cwd=directory)


def test_neither_a_checkpoint_nor_a_saved_config_causes_an_import(directory):
    """The command imports the user's code; evaluate, predict and report of the run do not, unless it is named again."""
    task, marker = f"task.name={module_of(directory)}:Halved", directory / "imported"
    settings = (*DIGITS, task, "task.args.factor=0.5", f"model.name={module_of(directory)}:Net", "model.args.width=8")
    command(directory, "train", *settings).succeeded()
    assert marker.exists()
    marker.unlink()
    saved = directory / "runs/run/config.yaml"
    assert to_yaml(load_config([], [*settings, "wandb.project=distlenet"])) == saved.read_text()
    for words, given in (
        (("evaluate", "checkpoint=runs/run"), True),
        (("predict", "checkpoint=runs/run", "image.png"), True),
        (("report", "runs/run", "--replay-wandb"), False),
    ):
        ran = command(directory, *words)
        assert not marker.exists(), words
        if given:
            assert ran.status == 2
            assert f"add {task}" in ran.stderr
    named = (task, "task.args.factor=0.25", f"model.name={module_of(directory)}:Net")
    assert "test loss" in command(directory, "evaluate", "checkpoint=runs/run", *named).succeeded().stdout
    assert marker.exists()


def test_the_package_offers_its_api(directory):
    program = (
        "from distlenet import train, load_config, Task, ImageClassification, Datasets, UserError\n"
        f"summary = train(load_config([], {list(DIGITS)!r}))\n"
        "from distlenet import train as again\n"
        "import json; print(json.dumps([summary['steps'], again is train]))\n"
    )
    ran = run_command(sys.executable, "-c", program, cwd=directory).succeeded()
    assert json.loads(ran.stdout.splitlines()[-1]) == [2, True]


def test_importing_the_package_does_not_import_torch():
    run_command(sys.executable, "-c", "import distlenet, sys; assert 'torch' not in sys.modules").succeeded()


def test_a_module_of_torch_is_a_network():
    model = make_model(ModelConfig(name="torch.nn:Linear", args={"in_features": 2, "out_features": 3}))
    assert isinstance(model, nn.Linear)
