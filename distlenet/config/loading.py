"""Reading settings: the one place that reads YAML, and that answers every mistake in it with one line.

``load_config`` merges configuration files, then ``key=value`` pairs, over the schema's defaults
(OmegaConf structured configs). Each value is checked where it is given, so that a message can name it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.config.fields import FIELDS, check, describe, flatten, undo_yaml_coercion, unknown_key
from distlenet.config.schema import Config
from distlenet.utils.errors import UserError


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
            value = undo_yaml_coercion(key, read, where)
            check(key, value, where)
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
        check(key, value, "config")  # once more: an interpolation is only now a value
    check_whole(config)
    return config


def check_whole(config: Config) -> None:
    """Raise UserError for what type and range of each value alone do not say."""
    if config.optim.nesterov and config.optim.name == "sgd" and config.optim.momentum == 0:
        raise UserError("optim.nesterov=true: needs optim.momentum above 0; give optim.nesterov=false")
    if (name := config.run.name) is not None and (name in ("", "..") or Path(name).name != name):
        raise UserError(f"run.name={name}: expected one folder's name; the path to it is run.dir")
    if not 0 < len(config.wandb.project) <= 128 or set("/\\#?%:") & set(config.wandb.project):
        raise UserError(f"wandb.project={config.wandb.project[:200]}: expected 1 to 128 letters, without / \\ # ? % :")
    if unknown := [key for key in config.checkpoint.allow_changed if key not in FIELDS]:
        raise UserError(f"checkpoint.allow_changed: {unknown_key(unknown[0])}")
    if fixed := {"model.name", "optim.name"} & set(config.checkpoint.allow_changed):
        raise UserError(
            f"checkpoint.allow_changed: {min(fixed)} cannot change, since the checkpoint's state would not fit; "
            "leave it out"
        )


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
        raise UserError(f"{text[:200]!r}: {unknown_key(key[:100])}")
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text])))
    except (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException) as error:
        raise UserError(f"{text[:200]}: the value is not valid YAML: {_one_line(error)}") from error


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:300]
