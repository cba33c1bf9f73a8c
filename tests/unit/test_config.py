import re
import sys
from pathlib import Path

import pytest
from conftest import REPO, run_command

from distlenet.config.fields import FIELDS, RENAMED
from distlenet.config.loading import identity, load_config, run_directory, to_yaml
from distlenet.config.schema import Config
from distlenet.config.virtual_shards import virtual_shards
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_later_files_win_over_earlier_ones_and_overrides_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1, momentum: 0.5}\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 0.2}\n")
    config = load_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], ["seed=7", "train.max_steps=1_0"])
    assert (config.optim.lr, config.optim.momentum, config.seed, config.train.max_steps) == (0.2, 0.5, 7, 10)
    assert config.data == Config().data


def test_the_saved_config_reads_back(tmp_path):
    words = [
        "optim.lr=1e-3",
        "data.crop_scale=[0.5,1]",
        "data.crop=[20,24]",
        "train.max_grad_norm=2",
        "checkpoint.allow_changed=[seed]",
        "run.name=x",
    ]
    config = load_config([], words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("name", [path.name for path in (REPO / "configs").glob("*.yaml")])
def test_shipped_configs_contain_only_differences_from_the_defaults(name):
    path = REPO / "configs" / name
    config = load_config([str(path)])
    if name == "default.yaml":
        assert config == Config()
    else:
        given = re.findall(r"^\s*\w+: *[^\s#{]+", path.read_text(), re.M)
        defaults = to_yaml(Config()).splitlines()
        changed = [line for line in to_yaml(config).splitlines() if line not in defaults]
        repeated = {line.strip() for line in given} - {line.strip() for line in changed}
        assert repeated <= {"momentum: 0.9"}, "only differences from the schema's defaults"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "did you mean optim.lr?"]),
        ("lr=1", ["'lr'", "did you mean optim.lr?"]),
        ("train.epoch=3", ["'train.epoch'", "did you mean train.epochs?"]),
        ("zzzz=1", ["'zzzz'", "--help"]),
        ("seed=x", ["seed=x", "an integer"]),
        ("seed=1.5", ["seed=1.5", "an integer"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        ("seed=", ["seed=", "an integer"]),
        ("train.epochs=0", ["train.epochs=0", "at least 1"]),
        ("distributed.virtual_shards=many", ["an integer, at least 1, less than 1,048,576, or auto"]),
        ("train.global_batch_size=-4", ["train.global_batch_size=-4", "at least 1"]),
        ("optim.lr=0", ["optim.lr=0", "more than 0"]),
        ("optim.lr=nan", ["optim.lr=nan", "a number"]),
        ("data.flip=1.5", ["data.flip=1.5", "at least 0, at most 1"]),
        ("data.crop_scale=0.5", ["data.crop_scale=0.5", "[LOWEST,HIGHEST], each a number, more than 0, at most 1"]),
        ("data.crop_scale=[0.5,0.2]", ["[LOWEST,HIGHEST]"]),
        ("data.crop_scale=[0.5,1.1]", ["[LOWEST,HIGHEST]"]),
        ("data.crop_scale=[0.5]", ["[LOWEST,HIGHEST]"]),
        ("optim.lr=1e999", ["optim.lr=1e999", "a number"]),
        ("optim.momentum=1", ["optim.momentum=1", "less than 1"]),
        ("optim.name=adam", ["optim.name=adam", "sgd, adamw or MODULE:ATTRIBUTE"]),
        ("precision=fp8", ["precision=fp8", "auto, fp32, bf16 or fp16"]),
        ("data.drop_last=perhaps", ["data.drop_last=perhaps", "true or false"]),
        ("optim=3", ["optim=3", "group"]),
        ("optim={lr: 0.1, q: 2}", ["'optim.q'"]),
        ("seed=[1", ["seed=[1", "not valid YAML"]),
        ("seed", ["seed: expected key=value; write seed=VALUE"]),
        ("sead", ["sead: expected key=value"]),
        ("train.profile_all_ranks=true", ["train.profile_all_ranks=true: needs train.profile_steps=A:B"]),
        ("=1", ["key=value"]),
        ("seed=${nope}", ["seed=${nope}", "an integer"]),
        ("run.name=../x", ["run.name=../x", "run.dir"]),
        ("wandb.project=a/b", ["wandb.project=a/b", "without /"]),
        ("wandb.project=''", ["wandb.project=: expected 1 to 128 characters"]),
        ("train.profile_steps=5", ["train.profile_steps=5: expected A:B, A less than B"]),
        ("train.profile_steps=7:7", ["train.profile_steps=7:7: expected A:B, A less than B"]),
        ("train.profile_steps=-1:2", ["train.profile_steps=-1:2: expected A:B"]),
        ("tracking.prometheus=lenet.txt", ["tracking.prometheus=lenet.txt: node_exporter reads only files *.prom"]),
        ("data.cache=''", ["data.cache=: expected auto, off or a directory"]),
        ("data.cache=false", ["data.cache=false: expected auto, off or a directory"]),
        ("run.name=..", ["run.name=..", "run.dir"]),
        ("run.name=a\0b", ["not valid YAML"]),
        (
            "run.name=a #b",
            ["""run.name=a #b: YAML reads # as the start of a comment; put the value in quotes: run.name='"…"'"""],
        ),
        ("run.name=#b", ["run.name=#b", "put the value in quotes"]),
        ("optim.lr=0.1 # high", ["optim.lr=0.1 # high", "the start of a comment"]),
        ("run.name=a\tb", ["run.name=a\\tb", "at most 1,000 printable characters"]),
        ("data.root=" + "a" * 2000, ["at most 1,000 printable characters"]),
        ("seed=???", ["seed=???"]),
        ("seed=" + "9" * 400, ["less than 4,294,967,296"]),
        ("optim.lr=" + "9" * 400, ["optim.lr=999"]),
        ("train.epochs=" + "9" * 5000, ["train.epochs=999"]),
        ("seed=" + "[" * 2000 + "]" * 2000, ["seed=[[["]),
        ("train.global_batch_size=10000000000", ["less than 2,147,483,648"]),
        ("distributed.threads=100000", ["less than 1,000"]),
        ("optim.weight_decay=${optim.nope}", ["optim.weight_decay"]),
        ("checkpoint.allow_changed=[[seed]]", ["checkpoint.allow_changed"]),
        ("checkpoint.allow_changed=[optim.name]", ["optim.name cannot change"]),
        ("checkpoint.allow_changed=[sead]", ["'sead'", "did you mean seed?"]),
        ("optim.momentum=0", ["optim.nesterov=false"]),
        ("seed=a\nb", ["seed=a\\nb: expected an integer"]),
    ],
)
def test_an_invalid_override_raises_an_error_of_one_line(override, parts):
    with pytest.raises(UserError) as error:
        load_config([], [override])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "a mapping of settings, got a list"),
        ("optim: {lrr: 1}", "did you mean optim.lr?"),
        ("optim: {lr: fast}", "optim.lr=fast: expected a number"),
        ("optim: 3", "optim is a group"),
        ("\xff\xfe", "not valid YAML"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_an_invalid_file_raises_an_error_of_one_line_that_names_it(tmp_path, content, part):
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        load_config([str(path)])
    assert str(path) in str(error.value)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_value_is_null():
    assert load_config([], ["run.name="]).run.name is None


def test_the_value_of_a_reference_is_validated():
    assert load_config([], ["optim.lr=${optim.momentum}"]).optim.lr == 0.9
    with pytest.raises(UserError, match=r"weight_decay}: optim\.lr=0: expected a number, more than 0"):
        load_config([], ["optim.lr=${optim.weight_decay}", "optim.weight_decay=0"])


def test_a_file_may_contain_dotted_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("optim.lr: 0.3\ntrain: {epochs: 2}\n")
    config = load_config([str(tmp_path / "c.yaml")])
    assert (config.optim.lr, config.train.epochs) == (0.3, 2)


def test_a_missing_file_and_a_directory_raise_errors_that_name_them(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"--config {path}: cannot be read")):
            load_config([str(path)])


def test_the_run_name_depends_on_result_changing_settings_only():
    name = run_directory(load_config())
    assert run_directory(load_config([], ["data.num_workers=2", "run.console=tutorial", "device=cpu"])) == name
    assert run_directory(load_config([], ["seed=1"])) != name
    assert run_directory(load_config([], ["run.dir=x", "run.name=y"])) == Path("x/y")


def test_the_identity_of_a_run_is_stable():
    """Existing run directories carry these digits in their names."""
    assert identity(load_config()) == "44136fa3"
    words = ["optim.weight_decay=0", "train.max_grad_norm=2", "data.name=digits"]
    assert identity(load_config([], words)) == "580f3ce1"


@pytest.mark.parametrize(
    ("batch", "shards"),
    [
        (1, 1),
        (63, 1),
        (64, 2),
        (65, 1),
        (66, 2),
        (256, 2),
        (511, 1),
        (512, 2),
        (516, 2),
        (1024, 4),
        (2048, 8),
        (2**20, 8),
    ],
)
def test_virtual_shards_of_auto_divide_the_batch_and_are_large(batch, shards):
    config = load_config([], [f"train.global_batch_size={batch}"])
    assert config.distributed.virtual_shards == "auto"
    assert virtual_shards(config) == shards
    assert virtual_shards(load_config([], [f"train.global_batch_size={batch}", "distributed.virtual_shards=3"])) == 3


def test_auto_and_the_same_number_of_virtual_shards_are_the_same_run():
    """A run of a former version, whose default was 8, keeps its name; ``ddp`` has no shards."""
    exact = "distributed.reduction=exact"
    names = [identity(load_config([], [exact, *more])) for more in ([], ["distributed.virtual_shards=2"])]
    assert names[0] == names[1]
    former = identity(load_config([], [exact, "distributed.virtual_shards=8"]))
    assert former == "bedbef60"
    assert former != names[0]
    assert identity(load_config([], ["distributed.virtual_shards=3"])) == identity(load_config())


def test_values_have_the_types_of_the_schema():
    words = ["optim.weight_decay=0", "train.max_grad_norm=2", 'train.epochs="3"', "data.drop_last=yes"]
    config = load_config([], words)
    values = (config.optim.weight_decay, config.train.max_grad_norm, config.train.epochs, config.data.drop_last)
    assert values == (0.0, 2.0, 3, True)
    assert [type(value) for value in values] == [float, float, int, bool]


def test_each_setting_has_a_help_and_a_description():
    for key, field in FIELDS.items():
        assert field.help.endswith("."), key
        assert field.describe(), key
    assert FIELDS["model.name"].describe() == "lenet or MODULE:ATTRIBUTE"
    assert FIELDS["run.report"].describe() == "auto, always or never"
    assert FIELDS["train.max_steps"].describe() == "an integer, at least 1, less than 9,007,199,254,740,992, or null"


def test_the_page_of_settings_is_current():
    printed = run_command(sys.executable, "-m", "distlenet.config").succeeded().stdout
    assert (REPO / "docs/settings.md").read_text() == printed, "run: python -m distlenet.config > docs/settings.md"
    assert [key for key in FIELDS if f"| `{key}`" not in printed] == []


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_former_name_of_a_setting_suggests_the_present_name(old, new):
    assert new in FIELDS
    with pytest.raises(UserError) as error:
        load_config([], [f"{old}=1"])
    assert str(error.value) == f"{old}=1: unknown key {old!r}; did you mean {new}?"


CHOICES = [(key, choice) for key, field in FIELDS.items() for choice in field.choices]
CHOICES += [("data.cache", "off"), ("data.cache", "auto")]


@pytest.mark.parametrize(("key", "choice"), CHOICES)
def test_each_choice_of_a_setting_is_accepted_without_quotes(tmp_path, key, choice):
    """YAML reads some words as other types: a bare off is false."""
    group, _, leaf = key.rpartition(".")
    (tmp_path / "a.yaml").write_text(f"{group}:\n  {leaf}: {choice}\n" if group else f"{leaf}: {choice}\n")
    for config in (load_config([], [f"{key}={choice}"]), load_config([str(tmp_path / "a.yaml")])):
        assert getattr(getattr(config, group) if group else config, leaf) == choice


@pytest.mark.parametrize("text", ["on", "off", "yes", "007", "0x10", "1e3", "12:30", "1_000", "2024-01-01", "1.0"])
def test_a_string_setting_takes_the_text_as_typed_even_if_yaml_reads_another_type(tmp_path, text):
    """``run.name=007`` and ``run.name=7`` are two runs."""
    assert load_config([], [f"run.name={text}"]).run.name == text
    (tmp_path / "a.yaml").write_text(f"run: {{name: '{text}'}}")
    assert load_config([str(tmp_path / "a.yaml")]).run.name == text


@pytest.mark.parametrize(("typed", "name"), [("a#b", "a#b"), ("'a #b'", "a #b"), ('"#b" ', "#b")])
def test_a_value_may_contain_a_hash(typed, name):
    assert load_config([], [f"run.name={typed}"]).run.name == name


@pytest.mark.parametrize(("content", "given"), [("run: {name: 007}", "name=7"), ("wandb: {tags: [a, on]}", "tags=")])
def test_in_a_file_such_a_string_needs_quotes(tmp_path, content, given):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=rf"{given}.*in quotes"):
        load_config([str(tmp_path / "a.yaml")])


def test_the_settings_of_a_checkpoint_cannot_read_the_environment(monkeypatch):
    """A checkpoint is not trusted; the environment may contain secrets."""
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(UserError, match=r"run\.name contains a reference") as error:
        load_config(base={"run": {"name": "${oc.env:SECRET}"}})
    assert "hunter2" not in str(error.value)


def test_a_file_whose_aliases_expand_without_limit_is_rejected(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="too many aliases"):
        load_config([str(tmp_path / "bomb.yaml")])
