"""The settings of the schema by their dotted keys: which values each accepts, in words and as a check."""

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from distlenet.config.names import IMPORT_NAME
from distlenet.config.schema import Config

MAX_LENGTH = 1000  # characters of a string: it has to fit into a path and into a message of one line
STRING_HINT = f", of at most {MAX_LENGTH:,} printable characters; put numbers and booleans in quotes"
KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list of strings",
    dict: "a mapping of arguments",
}
INPUTS = {bool: (bool, int, str), int: (int, str), float: (float, int, str), str: (str,), list: (list,), dict: (dict,)}
AUTO = Literal["auto"]
OFF = Literal["off"]
MAX_DEPTH = 8  # of nested lists and mappings
BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}


@dataclass(frozen=True)
class Field:
    """One setting. ``kind`` is bool, int, float, str, list or dict; ``choices`` are the strings of a Literal.

    ``names`` are the built-in names of a setting that also accepts ``module:attribute``. ``pair``: a list of two values
    is accepted too. ``auto``: so is this word, in place of a number. ``range``: two values, [LOWEST,HIGHEST], are
    expected. ``off``: this word needs no quotes in a file.
    """

    kind: type
    choices: tuple[str, ...]
    nullable: bool
    pair: bool
    auto: bool
    range: bool
    off: bool
    default: Any
    help: str
    result: bool
    names: tuple[str, ...]
    bounds: Mapping[str, float]

    def describe(self) -> str:
        """Return the accepted values in words, such as ``an integer, at least 1, or null``."""
        words = (*self.names, "MODULE:ATTRIBUTE") if self.names else self.choices
        choices = ", ".join((*words[:-2], " or ".join(words[-2:])))
        bounds = [f"{BOUNDS[name][0]} {bound:,}" for name, bound in self.bounds.items()]
        kind = choices or KINDS[self.kind]
        if self.range:
            return ", ".join(["[LOWEST,HIGHEST]", f"each {kind}", *bounds])
        others = ["or [HEIGHT,WIDTH]"] * self.pair + ["or auto"] * self.auto + ["or null"] * self.nullable
        return ", ".join([kind, *bounds, *others])

    def convert(self, value: Any) -> Any:
        """Return ``value`` in the type of this setting. Raise ValueError, with what is expected, if it is wrong."""
        try:
            return self._convert(value)
        except (ValueError, TypeError, LookupError, OverflowError):
            hint = STRING_HINT if self.kind in (str, list) and not (self.choices or self.names) else ""
            raise ValueError(f"expected {self.describe()}{hint}") from None

    def _convert(self, value: Any) -> Any:
        if value is None and self.nullable:
            return None
        if self.auto and value == "auto":
            return value
        if self.off and value is False:  # YAML reads off as false
            return "off"
        if self.pair and isinstance(value, list):
            if len(value) != 2:
                raise ValueError
            return [replace(self, pair=False, nullable=False).convert(side) for side in value]
        if self.range:
            low, high = (replace(self, range=False).convert(end) for end in value)
            if low > high:
                raise ValueError
            return [low, high]
        if self.choices:
            return self.choices[self.choices.index("off" if value is False else value)]  # YAML reads off as false
        if type(value) not in INPUTS[self.kind]:
            raise ValueError
        if self.names and value not in self.names and not IMPORT_NAME.fullmatch(value):
            raise ValueError
        if self.kind is dict:
            _check_plain(value)
            return value
        if self.kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
        if self.kind in (str, list):
            strings = value if self.kind is list else [value]
            valid = all(isinstance(s, str) and s.isprintable() and len(s) <= MAX_LENGTH for s in strings)
        else:
            value = self.kind(value)
            valid = math.isfinite(value) and all(BOUNDS[n][1](value, bound) for n, bound in self.bounds.items())
        if not valid:
            raise ValueError
        return value


def _check_plain(value: Any, depth: int = 0) -> None:
    """Raise ValueError if an argument is not made of the plain values that YAML and JSON share."""
    if depth > MAX_DEPTH:
        raise ValueError
    if isinstance(value, dict):
        for name, inner in value.items():
            if not (isinstance(name, str) and name.isidentifier() and len(name) <= MAX_LENGTH):
                raise ValueError
            _check_plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth + 1)
    elif isinstance(value, str):
        if not value.isprintable() or len(value) > MAX_LENGTH:
            raise ValueError
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError
    elif not (value is None or isinstance(value, bool | int)):
        raise ValueError


def _read_schema(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Field]]:
    for field in dataclasses.fields(schema):
        if field.name in GROUPS and not prefix:
            yield from _read_schema(GROUPS[field.name], f"{field.name}.")
            continue
        types, origin = get_args(field.type), get_origin(field.type)
        choices, is_range = types if origin is Literal else (), field.type == list[float]
        kind = str if choices else origin if origin in (list, dict) and not is_range else (*types, field.type)[0]
        default = getattr(schema(), field.name)
        flags = type(None) in types, list[int] in types, AUTO in types, is_range, OFF in types
        yield prefix + field.name, Field(kind, choices, *flags, default, **field.metadata)


GROUPS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
FIELDS: dict[str, Field] = dict(_read_schema(Config))
"""Every setting by its dotted key, in the schema's order."""

MAPPINGS = tuple(key for key, field in FIELDS.items() if field.kind is dict)

RENAMED = {  # former and usual names of settings: unknown keys, for which the message suggests the current name
    "train.batch_size": "train.global_batch_size",
    "optim.learning_rate": "optim.lr",
    "train.clip_norm": "train.max_grad_norm",
    "train.skip_at_most": "train.max_skipped_steps",
    "data.workers": "data.num_workers",
    "distributed.uneven": "distributed.allow_uneven_batches",
    "distributed.compress": "distributed.gradient_compression",
    "distributed.start_timeout_s": "distributed.init_timeout_s",
    "distributed.timeout_s": "distributed.step_timeout_s",
    "checkpoint.keep": "checkpoint.keep_last",
    "checkpoint.grace_s": "checkpoint.preemption_grace_s",
    "checkpoint.restarts_in_vain": "checkpoint.max_restarts_without_progress",
    "wandb.finish_s": "wandb.finish_timeout_s",
}


def unknown_key(key: str) -> str:
    """Return the message for an unknown key."""
    nearest = nearest_key(key)
    return f"unknown key {key!r}; " + (f"did you mean {nearest}?" if nearest else "--help lists all keys")


def nearest_key(key: str) -> str:
    """Return the nearest key, by the whole key or by its last part, or an empty string if none is similar."""
    spellings = RENAMED | {known: known for known in FIELDS}
    leaves = {spelling.rpartition(".")[2]: known for spelling, known in spellings.items()}
    for name, known in ((key, spellings), (key.rpartition(".")[2], leaves)):
        if close := difflib.get_close_matches(name, known, n=1):
            return known[close[0]]
    return ""


def split_mapping_key(key: str) -> tuple[str, list[str]]:
    """Split ``model.args.NAME`` into the setting and the path inside its value; the path of other keys is empty."""
    for mapping in MAPPINGS:
        if key.startswith(f"{mapping}."):
            return mapping, key.removeprefix(f"{mapping}.").split(".")
    return key, []


def flatten(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield nested settings as (dotted key, value)."""
    for name, value in values.items():
        if name in GROUPS and isinstance(value, Mapping):
            yield from ((f"{name}.{leaf}", inner) for leaf, inner in value.items())
        else:
            yield str(name), value


def to_yaml_value(value: Any) -> str:
    """Return a value as a user writes it: null, true."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)[:MAX_LENGTH]
