"""One setting: which values it takes, in words and as a check, and how a value is written."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.config.schema import Config
from distlenet.utils.errors import UserError

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


def flatten(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings as (dotted key, value); only the schema's groups are entered."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in GROUPS and isinstance(value, Mapping):
            yield from flatten(value, key + ".")
        else:
            yield key, value


def to_yaml_value(value: Any) -> str:
    """Write a value the way the user does: null, true."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)[:LONGEST]


def default(key: str) -> str:
    """Write a setting's default the way the user would."""
    field = FIELDS[key]
    return "[]" if field.default is dataclasses.MISSING else to_yaml_value(field.default)


def describe(key: str) -> str:
    """Say in words which values a setting takes, such as ``a whole number, at least 1, or null``."""
    field = FIELDS[key]
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    kinds = (field.type,) if get_origin(field.type) in (Literal, list) else get_args(field.type) or (field.type,)
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            *some, last = get_args(kind)
            words.append(f"{', '.join(some)} or {last}" if some else last)
        elif get_origin(kind) is list:
            words.append("a list of texts")
        elif kind is not type(None):
            words.append(names[kind])
    bounds = {"ge": "at least", "gt": "more than", "lt": "less than"}
    words += [f"{word} {field.metadata[name]:,}" for name, word in bounds.items() if field.metadata[name] is not None]
    words += ["or null"] if type(None) in kinds else []
    return ", ".join(words)


def undo_yaml_coercion(key: str, value: Any, where: str) -> Any:
    """Undo what YAML makes of a text: a bare ``off`` is false to it, ``007`` is 7 and ``12:30`` is 750.

    What was typed is known of a ``key=value``, and of ``off`` where that is one of a setting's words.
    """
    kinds = kinds_of(key)
    if value is False and "off" in kinds:
        return "off"
    return where.partition("=")[2] if str in kinds and "=" in where and isinstance(value, int | float) else value


def kinds_of(key: str) -> tuple[Any, ...]:
    """Return what a setting takes: types, or the words themselves."""
    kind = FIELDS[key].type if key in FIELDS else None
    return (kind,) if isinstance(kind, type) and get_origin(kind) is None else get_args(kind)


def check(key: str, value: Any, where: str) -> None:
    """Raise UserError unless ``key`` exists and takes ``value``."""
    given = where if "=" in where else f"{where}: {key}={'null' if value is None else value}"
    given = given if len(given) <= 200 else given[:197] + "..."
    if key in GROUPS:
        file = ", or to go on from a file checkpoint.resume=FILE" * (key == "checkpoint")
        raise UserError(f"{given}: {key} is a group of settings; write {key}.KEY=VALUE{file}")
    if key not in FIELDS:
        raise UserError(f"{where}: {unknown_key(key)}")
    if value == "???":  # OmegaConf's word for a missing value, which it would pass over
        raise UserError(f"{given}: expected {describe(key)}")
    items = value if isinstance(value, list) else [value]
    if str in kinds_of(key) and any(isinstance(item, int | float) for item in items):
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


def unknown_key(key: str) -> str:
    """Say that a key is unknown, with the nearest right spelling of the whole key or of its last part."""
    close = difflib.get_close_matches(key, FIELDS, n=1)
    if not close:
        leaves = {known.rpartition(".")[2]: known for known in FIELDS}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1)]
    return f"unknown key {key!r}; " + (f"did you mean {close[0]}?" if close else "--help lists all keys")
