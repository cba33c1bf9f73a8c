"""The settings of a checkpoint: files replace some of them, and none of them causes an import."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from distlenet.config.fields import FIELDS, MAPPINGS, flatten, split_mapping_key, to_yaml_value
from distlenet.config.names import is_import_name
from distlenet.config.reading import Read, read_settings
from distlenet.utils.errors import UserError, printable


def read_base(base: Mapping[str, Any], used_names: Collection[str], given: Mapping[str, Any]) -> Read:
    """Yield the settings of a checkpoint, as ``read_settings``; ``given`` are those of files and overrides.

    Raise UserError if one of ``used_names`` is a name of the user's code that is not given, or for a reference.
    """
    saved = dict(flatten(base))
    if needed := [f"{key}={saved[key]}" for key in used_names if key not in given and _names_code(key, saved.get(key))]:
        names = printable(" ".join(needed)[:600])
        raise UserError(
            f"the checkpoint was made with {names}; code is never imported because a checkpoint names it: add {names}, "
            "if you trust it"
        )
    for key, value in saved.items():
        if _has_another_name(key, given, saved):
            continue
        if key == "data.root" and _names_code("data.name", given.get("data.name")):
            continue  # the directory of another data set: a function receives data.args only
        if "${" in str(value):  # a checkpoint is not trusted, and a reference can read the environment
            raise UserError(f"config: {key} contains a reference (${{...}}); the settings of a checkpoint have none")
        if not _names_code(key, value):
            yield key, value, f"config: {key}={to_yaml_value(value)}"


def read_files(files: Iterable[str], base: Mapping[str, Any], given: Mapping[str, Any]) -> Read:
    """Yield the settings of files, except those that change the result and are in the checkpoint.

    Names are yielded, too, and ``data.args.root``, a location as ``data.root`` is.
    """
    saved = dict(flatten(base))
    for full_key, value, text in read_settings(files, ()):
        key = split_mapping_key(full_key)[0]
        keeps = key in saved and key in FIELDS and FIELDS[key].result and not FIELDS[key].names
        if not keeps or _has_another_name(key, given, saved):
            yield full_key, value, text
        elif full_key == "data.args" and isinstance(value, Mapping) and "root" in value:
            yield "data.args.root", value["root"], text


def _has_another_name(key: str, given: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Return whether ``key`` holds the arguments of a name, and another name is given than that of the checkpoint."""
    name_key = key.removesuffix("_args") if key.endswith("_args") else key.replace(".args", ".name")
    return key in MAPPINGS and name_key in given and given[name_key] != saved.get(name_key)


def _names_code(key: str, value: Any) -> bool:
    """Return whether the value of a setting is a name of the user's code."""
    return key in FIELDS and bool(FIELDS[key].names) and isinstance(value, str) and is_import_name(value)
