"""Read settings from files and ``key=value`` pairs. Each mistake in them becomes a UserError of one line."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.config.fields import FIELDS, GROUPS, MAPPINGS, flatten, split_mapping_key, to_yaml_value, unknown_key
from distlenet.config.names import is_import_name, short_name
from distlenet.config.schema import Config
from distlenet.utils.errors import UserError, printable

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException)


def load_config(
    files: Sequence[str] = (),
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    used_names: Collection[str] = (),
) -> Config:
    """Merge ``base``, then ``files``, then ``key=value`` overrides over the defaults; the last value wins.

    ``base`` holds the settings of a checkpoint. It must not cause an import: a name of the user's code in it has to be
    given again by a file or an override if it is one of ``used_names``, and is replaced by the default if not. Raise
    UserError for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    values, given_as = dict(flatten(Config().to_dict())), {}
    for full_key, value, text in [*_read_base(base or {}, used_names, files, overrides), *_read(files, overrides)]:
        given = printable(text[:300])
        key, path = split_mapping_key(full_key)
        if key in GROUPS:
            file = ", or to resume from a file checkpoint.resume=FILE" * (key == "checkpoint")
            raise UserError(f"{given}: {key} is a group of settings; write {key}.KEY=VALUE{file}")
        if key not in FIELDS:
            raise UserError(f"{given}: {unknown_key(key)}")
        for name in reversed(path):
            value = {name: value}
        values[key] = _merge(values[key], value) if FIELDS[key].kind is dict else value
        given_as[key] = given
    values = _resolve(values, given_as)
    for key, given in given_as.items():
        value = values[key]
        if "${" in given:
            given += f": {key}={to_yaml_value(value)[:100]}"
            value = str(value) if FIELDS[key].kind is str and isinstance(value, int | float) else value
        try:
            values[key] = FIELDS[key].convert(value)
        except ValueError as error:
            raise UserError(f"{given}: {error}") from error
    config = Config(**{name: GROUPS[name](**v) if name in GROUPS else v for name, v in _nest(values).items()})
    _check_combinations(config)
    if not base:  # otherwise nothing is trained, and the optimizer may be the default in place of the user's code
        _check_optimizer(config)
    return config


def _read_base(
    base: Mapping[str, Any], used_names: Collection[str], files: Sequence[str], overrides: Sequence[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings of a checkpoint, as ``_read``. Raise UserError for what is not safe to use."""
    given = {key: value for key, value, _ in _read(files, overrides)} if base else {}
    saved = dict(flatten(base))
    for key, value in saved.items():
        name_key = key.removesuffix("_args") if key.endswith("_args") else key.replace(".args", ".name")
        if key in MAPPINGS and name_key in given and given[name_key] != saved.get(name_key):
            continue  # the arguments of another name
        if "${" in str(value):  # a checkpoint is not trusted, and a reference can read the environment
            raise UserError(f"config: {key} contains a reference (${{...}}); the settings of a checkpoint have none")
        if key in FIELDS and FIELDS[key].names and isinstance(value, str) and is_import_name(value):
            if key not in given and key in used_names:
                name = printable(value[:200])
                raise UserError(
                    f"{key}: the checkpoint was made with {name}; code is never imported because a checkpoint names "
                    f"it: add {key}={name}, if you trust it"
                )
            continue
        yield key, value, f"config: {key}={to_yaml_value(value)}"


def _read(files: Iterable[str], overrides: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield each key and value, and how an error message refers to the two."""
    for path in files:
        for key, value in flatten(read_yaml(path, f"--config {path}")):
            yield key, value, f"--config {path}: {key}={to_yaml_value(value)}"
    for text in overrides:
        for key, value in flatten(_read_override(text)):
            yield key, value, text


def _merge(old: Any, new: Any) -> Any:
    """Merge two mappings of arguments, recursively; of other values the new one wins."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{name: _merge(old.get(name), value) for name, value in new.items()}}


def _read_override(text: str) -> dict[str, Any]:
    key, equals, typed = text.partition("=")
    if not (equals and key):
        hint = f"; settings in a file: --config {text}; a run: checkpoint={text}" if os.path.exists(text) else ""
        raise UserError(f"{text[:200]}: expected key=value{hint}")
    if not re.fullmatch(r"\w+(\.\w+)*", key):  # OmegaConf reads brackets as more keys
        raise UserError(f"{text[:200]!r}: {unknown_key(key[:100])}")
    try:
        value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={typed}"])))["value"]
    except YAML_ERRORS as error:
        raise UserError(f"{text[:200]}: the value is not valid YAML: {_one_line(error)}") from error
    is_string = key in FIELDS and FIELDS[key].kind is str and not FIELDS[key].choices
    return {key: typed if is_string and isinstance(value, int | float) else value}  # run.name=007 is not 7


def _resolve(values: dict[str, Any], given_as: dict[str, str]) -> dict[str, Any]:
    """Replace references (``${...}``) by the values of other settings or of the environment."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(_nest(values)), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None))
        expected = f"; expected {FIELDS[key].describe()}" if key in FIELDS else ""
        reason = _one_line(getattr(error, "msg", error))
        raise UserError(f"{given_as.get(key, 'config')}: {reason}{expected}") from error
    return dict(flatten(cast(dict[str, Any], resolved)))


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {group: {} for group in GROUPS}
    for key, value in values.items():
        group, _, leaf = key.rpartition(".")
        (nested[group] if group else nested)[leaf] = value
    return nested


def _check_combinations(config: Config) -> None:
    """Raise UserError for what the type and the range of one value do not cover."""
    if (name := config.run.name) is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(f"run.name={name}: expected the name of one directory; its parent is run.dir")
    if not 0 < len(config.wandb.project) <= 128 or set("/\\#?%:") & set(config.wandb.project):
        raise UserError(f"wandb.project={config.wandb.project[:200]}: expected 1 to 128 characters, without /\\#?%:")
    for key, name in {
        "train.stop_when": config.train.stop_when,
        "checkpoint.best_by": config.checkpoint.best_by,
    }.items():
        if name is not None and not re.fullmatch("val/.+", name):
            raise UserError(f"{key}={name}: expected val/NAME, a metric of the validation set, such as val/loss")
    if unknown := [key for key in config.checkpoint.allow_changed if key not in FIELDS and key not in ("data", "code")]:
        raise UserError(f"checkpoint.allow_changed: {unknown_key(unknown[0])}")
    if fixed := {"task.name", "model.name", "optim.name"} & set(config.checkpoint.allow_changed):
        raise UserError(f"checkpoint.allow_changed: {min(fixed)} cannot change: the state would not fit; remove it")


def _check_optimizer(config: Config) -> None:
    """Raise UserError for settings of the optimizer that do not fit each other."""
    if config.optim.nesterov and config.optim.name == "sgd" and config.optim.momentum == 0:
        raise UserError("optim.nesterov=true: needs optim.momentum above 0; give optim.nesterov=false")
    fixed = {key for key in config.checkpoint.allow_changed if key.startswith("optim.")}
    if fixed and is_import_name(config.optim.schedule):
        raise UserError(
            f"checkpoint.allow_changed: {min(fixed)} cannot change: it is part of the state of "
            f"optim.schedule={config.optim.schedule}; remove it"
        )


def to_yaml(config: Config) -> str:
    """Return all settings as YAML that ``--config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))


def run_directory(config: Config) -> Path:
    """Return the directory of a run. Without a ``run.name``, the settings that change the result name it."""
    names = (config.task.name, config.data.name)
    label = short_name(next(filter(is_import_name, names), config.data.name))  # the task, if it is not built in
    return Path(config.run.dir) / (config.run.name or f"{label}-{identity(config)}")


def identity(config: Config) -> str:
    """Return 8 hex digits that depend only on the settings that change the result, and are not the default.

    A new setting therefore does not rename the runs that do not use it.
    """
    values = result_settings(config.to_dict())
    settings = json.dumps({key: v for key, v in values.items() if v != FIELDS[key].default}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def result_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change the result, as {dotted key: value}."""
    return {key: value for key, value in flatten(values) if key in FIELDS and FIELDS[key].result}


def read_yaml(path: str, name: str) -> dict[str, Any]:
    """Read a file of settings, which error messages call ``name``. Raise UserError."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}; give a readable YAML file") from error
    except YAML_ERRORS as error:
        reason = "too many aliases; write the values out" if "max_yaml_expanded" in str(error) else _one_line(error)
        raise UserError(f"{name}: not valid YAML: {reason}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{name}: expected a mapping of settings, got a {type(loaded).__name__}")
    return cast(dict[str, Any], loaded)


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:300]
