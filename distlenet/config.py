"""Reading settings: the one place that reads YAML, and that answers every mistake in it with one line.

``load_config`` merges configuration files, then ``key=value`` pairs, over the schema's defaults
(OmegaConf structured configs). Each value is checked where it is given, so that a message can name it.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

import yaml
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.errors import UserError
from distlenet.schema import Config

Field = dataclasses.Field


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, "Field[Any]"]]:
    for field in dataclasses.fields(schema):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


FIELDS: dict[str, "Field[Any]"] = dict(_fields(Config))
"""Every setting by its dotted key, in the schema's order."""

LONGEST = 1000
"""Letters of a text: it must fit into a path, and into a message of one line."""

GROUPS = {key.rpartition(".")[0] for key in FIELDS} - {""}


def load_config(
    files: Sequence[str] = (), overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Merge ``base``, then ``files``, then ``key=value`` overrides over the defaults; later ones win.

    Raises UserError, with one line, for a file that cannot be read, an unknown key, a wrong type or a
    value out of range. No process group is needed.
    """
    sources = [("config", base)] if base else []
    sources += [(f"--config {path}", read_yaml(path, f"--config {path}")) for path in files]
    sources += [(text, _read_override(text)) for text in overrides]
    merged, given = OmegaConf.structured(Config), {}
    for where, values in sources:
        nested: dict[str, Any] = {}
        for key, read in flatten(values):
            if where == "config" and "${" in str(read):  # a checkpoint may be anybody's, and this asks the environment
                raise UserError(f"config: {key} refers to something else (${{...}}), which no checkpoint's settings do")
            value = _as_written(key, read, where)
            _check(key, value, where)
            group, _, leaf = key.rpartition(".")
            (nested.setdefault(group, {}) if group else nested)[leaf] = value
            given[key] = where if "=" in where else f"{where}: {key}={value}"
        merged = OmegaConf.merge(merged, nested)
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation between keys that does not resolve
        key = str(error.full_key or error.key)
        expected = f"; expected {describe(key)}" if key in FIELDS else ""
        raise UserError(f"{given.get(key, 'config')[:200]}: {_one_line(error.msg or error)}{expected}") from error
    for key, value in flatten(config.to_dict()):
        _check(key, value, "config")  # once more: an interpolation is only now a value
    if config.optim.nesterov and config.optim.name == "sgd" and config.optim.momentum == 0:
        raise UserError("optim.nesterov=true: needs optim.momentum above 0; give optim.nesterov=false")
    if (name := config.run.name) is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(f"run.name={name}: expected one folder's name; the path to it is run.dir")
    if not 0 < len(config.wandb.project) <= 128 or set("/\\#?%:") & set(config.wandb.project):
        raise UserError(f"wandb.project={config.wandb.project[:200]}: expected 1 to 128 letters, without / \\ # ? % :")
    if unknown := [key for key in config.checkpoint.allow_changed if key not in FIELDS]:
        raise UserError(f"checkpoint.allow_changed: {_unknown_key(unknown[0])}")
    if fixed := {"model.name", "optim.name"} & set(config.checkpoint.allow_changed):
        raise UserError(
            f"checkpoint.allow_changed: {min(fixed)} cannot change, since the checkpoint's state would not fit; "
            "leave it out"
        )
    return config


def to_yaml(config: Config) -> str:
    """Write all settings as YAML that ``--config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))


def run_folder(config: Config) -> Path:
    """Return the folder of a run: ``run.dir`` / ``run.name``.

    The name made for ``run.name=null`` depends on the result-changing settings alone: the same command
    goes on with the same run, a changed one starts another.
    """
    if config.run.name is not None:
        return Path(config.run.dir) / config.run.name
    return Path(config.run.dir) / f"{config.data.name}-{identity(config)}"


def identity(config: Config) -> str:
    """Return 8 hex digits that are the same where the result-changing settings are."""
    settings = json.dumps(result_settings(config.to_dict()), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def result_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the settings that change what is learned, as {dotted key: value}."""
    return {key: value for key, value in flatten(values) if key in FIELDS and FIELDS[key].metadata["result"]}


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as (dotted key, value); only the schema's groups are entered."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in GROUPS and isinstance(value, Mapping):
            yield from flatten(value, key + ".")
        else:
            yield key, value


def in_yaml(value: Any) -> str:
    """Write a value the way the user does: null, true."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)[:LONGEST]


def default(key: str) -> str:
    """Write a setting's default the way the user would."""
    field = FIELDS[key]
    return "[]" if field.default is dataclasses.MISSING else in_yaml(field.default)


def describe(key: str) -> str:
    """Say in words which values a setting takes, such as ``a whole number, at least 1, or null``."""
    field = FIELDS[key]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds = (field.type,) if get_origin(field.type) in (Literal, list) else get_args(field.type) or (field.type,)
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            *some, last = get_args(kind)
            words.append(f"{', '.join(some)} or {last}")
        elif get_origin(kind) is list:
            words.append("a list of texts")
        elif kind is not type(None):
            words.append(names[kind])
    bounds = {"ge": "at least", "gt": "more than", "lt": "less than"}
    words += [f"{word} {field.metadata[name]:,}" for name, word in bounds.items() if field.metadata[name] is not None]
    words += ["or null"] if type(None) in kinds else []
    return ", ".join(words)


def _as_written(key: str, value: Any, where: str) -> Any:
    """Undo what YAML makes of a text: a bare ``off`` is false to it, ``007`` is 7 and ``12:30`` is 750.

    What was typed is known of a ``key=value``, and of ``off`` where that is one of a setting's words.
    """
    kinds = _kinds(key)
    if value is False and "off" in kinds:
        return "off"
    return where.partition("=")[2] if str in kinds and "=" in where and isinstance(value, int | float) else value


def _kinds(key: str) -> tuple[Any, ...]:
    """Return what a setting takes: types, or the words themselves."""
    kind = FIELDS[key].type if key in FIELDS else None
    return (kind,) if isinstance(kind, type) and get_origin(kind) is None else get_args(kind)


def _check(key: str, value: Any, where: str) -> None:
    """Raise UserError unless ``key`` exists and takes ``value``."""
    given = where if "=" in where else f"{where}: {key}={'null' if value is None else value}"
    given = given if len(given) <= 200 else given[:197] + "..."
    if key in GROUPS:
        file = ", or to go on from a file checkpoint.resume=FILE" * (key == "checkpoint")
        raise UserError(f"{given}: {key} is a group of settings; write {key}.KEY=VALUE{file}")
    if key not in FIELDS:
        raise UserError(f"{where}: {_unknown_key(key)}")
    if value == "???":  # OmegaConf's word for a missing value, which it would pass over
        raise UserError(f"{given}: expected {describe(key)}")
    items = value if isinstance(value, list) else [value]
    if str in _kinds(key) and any(isinstance(item, int | float) for item in items):
        raise UserError(f"{given}: expected {describe(key)}; write what looks like a number or a truth value in quotes")
    if isinstance(value, str) and "${" in value:  # an interpolation: looked at again when it is resolved
        return
    try:
        alone = OmegaConf.merge(OmegaConf.structured(_alone(key)), {"value": value})
        typed = OmegaConf.select(alone, "value", throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{given}: expected {describe(key)}") from error
    texts = typed if isinstance(typed, ListConfig) else [typed]
    if any(isinstance(text, ListConfig) or (isinstance(text, str) and not _is_plain(text)) for text in texts):
        raise UserError(f"{given!r}: expected {describe(key)}, of at most {LONGEST:,} letters, all printable")
    if isinstance(typed, int | float):
        limits = FIELDS[key].metadata
        if (
            (isinstance(typed, float) and not math.isfinite(typed))
            or (limits["ge"] is not None and typed < limits["ge"])
            or (limits["gt"] is not None and typed <= limits["gt"])
            or (limits["lt"] is not None and typed >= limits["lt"])
        ):
            raise UserError(f"{given}: expected {describe(key)}")


@functools.cache
def _alone(key: str) -> type:
    """Make a schema of one setting: to check a value against the whole one takes a hundred times as long."""
    field = FIELDS[key]
    default = dataclasses.field(default=field.default, default_factory=field.default_factory)
    return dataclasses.make_dataclass("Alone", [("value", field.type, default)])


def _is_plain(text: str) -> bool:
    """Say whether a text can be a part of a path and of a message of one line."""
    return text.isprintable() and len(text) <= LONGEST


def _unknown_key(key: str) -> str:
    """Say that a key is unknown, with the nearest right spelling of the whole key or of its last part."""
    close = difflib.get_close_matches(key, FIELDS, n=1)
    if not close:
        leaves = {known.rpartition(".")[2]: known for known in FIELDS}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)]
    return f"unknown key {key!r}; " + (f"did you mean {close[0]}?" if close else "--help lists all keys")


def read_yaml(path: str, named: str) -> dict[str, Any]:
    """Read a file of settings; ``named`` is what messages call it. Raises UserError."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{named}: cannot be read: {error.strerror or error}; give a YAML file that can") from error
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        reason = "too many aliases; write the values out" if "max_yaml_expanded" in str(error) else _one_line(error)
        raise UserError(f"{named}: not valid YAML: {reason}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{named}: expected a mapping of settings, got a {type(loaded).__name__}")
    return cast(dict[str, Any], loaded)


def _read_override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not (equals and key):
        hint = f"; settings in a file: --config {text}; a run: checkpoint={text}" if os.path.exists(text) else ""
        raise UserError(f"{text[:200]}: expected key=value{hint}")
    if not re.fullmatch(r"\w+(\.\w+)*", key):  # brackets, which OmegaConf would read as more keys
        raise UserError(f"{text[:200]!r}: {_unknown_key(key[:100])}")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text])))
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{text[:200]}: the value is not valid YAML: {_one_line(error)}") from error


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:300]
