"""Read settings from files and ``key=value`` pairs. Each mistake in them becomes a UserError of one line."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.config.checkpoint_settings import read_base, read_files
from distlenet.config.fields import FIELDS, GROUPS, flatten, split_mapping_key, to_yaml_value, unknown_key
from distlenet.config.names import check_module, is_import_name, short_name
from distlenet.config.profiled_steps import profiled_steps
from distlenet.config.reading import read_settings
from distlenet.config.schema import Config
from distlenet.config.virtual_shards import resolve_virtual_shards, virtual_shards
from distlenet.utils.errors import UserError, one_line, printable, warn
from distlenet.utils.urls import is_url, join_url, local_copy_of, temporary_directory, url_problem

VIRTUAL_SHARDS = "distributed.virtual_shards"


def load_config(
    files: Sequence[str] = (),
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    used_names: Collection[str] = (),
) -> Config:
    """Merge ``base``, then ``files``, then ``key=value`` overrides over the defaults; the last value wins.

    ``base`` holds the settings of a checkpoint. It must not cause an import: a name of the user's code in it has to be
    given again by a file or an override if it is one of ``used_names``, and is replaced by the default if not.
    Overrides replace any of its other settings; files replace only those that do not change the result (see
    ``warn_of_unused_settings``). Raise UserError for an unreadable file, an unknown key, a wrong type or a value out of
    range.
    """
    values, given_as = dict(flatten(Config().to_dict())), {}
    given = {key: value for key, value, _ in read_settings(files, overrides)} if base else {}
    from_base, from_files = read_base(base or {}, used_names, given), read_files(files, base or {}, given)
    for full_key, value, text in [*from_base, *from_files, *read_settings((), overrides)]:
        shown = printable(text[:300])
        key, path = split_mapping_key(full_key)
        if key in GROUPS:
            file = ", or to resume from a file checkpoint.resume=FILE" * (key == "checkpoint")
            raise UserError(f"{shown}: {key} is a group of settings; write {key}.KEY=VALUE{file}")
        if key not in FIELDS:
            raise UserError(f"{shown}: {unknown_key(key)}")
        for name in reversed(path):
            value = {name: value}
        values[key] = _merge(values[key], value) if FIELDS[key].kind is dict else value
        given_as[key] = shown
    values = _resolve(values, given_as)
    for key, shown in given_as.items():
        value = values[key]
        if "${" in shown:
            shown += f": {key}={to_yaml_value(value)[:100]}"
            value = str(value) if FIELDS[key].kind is str and isinstance(value, int | float) else value
        try:
            values[key] = FIELDS[key].convert(value)
        except ValueError as error:
            raise UserError(f"{shown}: {error}") from error
    config = Config(**{name: GROUPS[name](**v) if name in GROUPS else v for name, v in _nest(values).items()})
    _check_combinations(config)
    if not base:  # otherwise nothing is trained, and the optimizer may be the default in place of the user's code
        _check_optimizer(config)
    return config


def warn_of_unused_settings(files: Sequence[str], overrides: Sequence[str], base: Mapping[str, Any]) -> None:
    """Warn if ``load_config`` does not use settings of ``files``, because those of a checkpoint differ."""
    if not files:
        return
    given, used = (result_settings(load_config(files, overrides, each).to_dict()) for each in (None, base))
    replaced = {split_mapping_key(key)[0] for key, _, _ in read_settings((), overrides)}
    keys = dict.fromkeys(split_mapping_key(key)[0] for key, _, _ in read_settings(files, ()))
    if unused := [
        f"{key}={to_yaml_value(given[key])} (in the checkpoint {to_yaml_value(used[key])})"
        for key in keys
        if key not in replaced and key in given and key in used and _merge(used[key], given[key]) != used[key]
    ]:
        warn(f"--config: {', '.join(unused)}: not used, since the checkpoint differs; key=value replaces one")


def _merge(old: Any, new: Any) -> Any:
    """Merge two mappings of arguments, recursively; of other values the new one wins."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{name: _merge(old.get(name), value) for name, value in new.items()}}


def _resolve(values: dict[str, Any], given_as: dict[str, str]) -> dict[str, Any]:
    """Replace references (``${...}``) by the values of other settings or of the environment."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(_nest(values)), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = str(getattr(error, "full_key", None))
        expected = f"; expected {FIELDS[key].describe()}" if key in FIELDS else ""
        reason = one_line(getattr(error, "msg", error))
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
    if re.match(r"\w+:/", config.run.dir) and not is_url(config.run.dir):
        raise UserError(f"run.dir={config.run.dir}: expected a directory, or a URL such as s3://bucket/prefix")
    url = join_url(config.run.dir, name or "")
    if is_url(config.run.dir) and (problem := url_problem(url)):
        raise UserError(f"run.dir and run.name: {url}: {problem}")
    project = config.wandb.project
    if project is not None and (not 0 < len(project) <= 128 or set("/\\#?%:") & set(project)):
        raise UserError(f"wandb.project={project[:200]}: expected 1 to 128 characters, without /\\#?%:")
    if not profiled_steps(config.train.profile_steps) and config.train.profile_all_ranks:
        raise UserError("train.profile_all_ranks=true: needs train.profile_steps=A:B")
    prometheus = config.tracking.prometheus
    if prometheus is not None and not Path(prometheus).name.endswith(".prom"):
        raise UserError(f"tracking.prometheus={prometheus}: node_exporter reads only files *.prom; give such a name")
    if config.data.cache in ("", "true", "false", "on", "yes", "no", "none"):
        raise UserError(f"data.cache={config.data.cache}: expected auto, off or a directory")
    if config.data.flip and config.data.augment == "flip_shift":
        raise UserError(
            f"data.flip={config.data.flip:g}: data.augment=flip_shift mirrors half of the images already; give "
            "data.augment=shift"
        )
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


def check_modules(config: Config) -> None:
    """Raise UserError if a setting names a module that does not exist: at once, although it is imported later."""
    for key, value in flatten(config.to_dict()):
        if FIELDS[key].names and is_import_name(value):
            check_module(key, value)


def to_yaml(config: Config) -> str:
    """Return all settings as YAML that ``--config`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.to_dict()))


def run_directory(config: Config) -> Path:
    """Return the directory of a run on this machine, also if ``run_url`` is in an object store."""
    return runs_directory(config) / run_name(config)


def runs_directory(config: Config) -> Path:
    """Return the parent of the run directories on this machine."""
    if is_url(config.run.dir):
        return local_copy_of(config.run.dir, config.run.local_dir or temporary_directory() / "runs")
    return Path(config.run.dir)


def run_url(config: Config) -> str | None:
    """Return the URL of a run in an object store; None if ``run.dir`` is a directory."""
    return join_url(config.run.dir, run_name(config)) if is_url(config.run.dir) else None


def run_name(config: Config) -> str:
    """Return the name of a run. Without a ``run.name``, the settings that change the result name it."""
    names = (config.task.name, config.data.name)
    label = short_name(next(filter(is_import_name, names), config.data.name))  # the task, if it is not built in
    return config.run.name or f"{label}-{identity(config)}"


def identity(config: Config) -> str:
    """Return 8 hex digits that depend only on the settings that change the result, and are not the default.

    A new setting therefore does not rename the runs that do not use it.
    """
    defaults = {key: field.default for key, field in FIELDS.items()} | {VIRTUAL_SHARDS: 8}  # as in former versions
    values = result_settings(config.to_dict())
    settings = json.dumps({key: v for key, v in values.items() if v != defaults[key]}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:8]


def result_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change the result, as {dotted key: value}.

    ``data.args.root`` is not included: it is a location, as ``data.root`` is, and a fingerprint identifies the data.
    The number of virtual shards is resolved, and included only if ``distributed.reduction`` uses it.
    """
    settings = {key: value for key, value in flatten(values) if key in FIELDS and FIELDS[key].result}
    if isinstance(arguments := settings.get("data.args"), Mapping):
        settings["data.args"] = {name: value for name, value in arguments.items() if name != "root"}
    if settings.get("distributed.reduction") != "exact":
        settings.pop(VIRTUAL_SHARDS, None)
    elif settings.get(VIRTUAL_SHARDS) == "auto":
        settings[VIRTUAL_SHARDS] = resolve_virtual_shards("auto", settings["train.global_batch_size"])
    return settings


def settings_to_save(config: Config) -> dict[str, Any]:
    """Return the settings as a checkpoint holds them: nested, with the resolved number of virtual shards."""
    values = config.to_dict()
    values["distributed"]["virtual_shards"] = virtual_shards(config)
    return values
