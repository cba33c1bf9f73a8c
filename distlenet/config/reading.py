"""Read settings as they are written: in YAML files, and in ``key=value`` pairs."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlenet.config.fields import FIELDS, flatten, to_yaml_value, unknown_key
from distlenet.utils.bundled import bundled
from distlenet.utils.errors import UserError, one_line

YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, OmegaConfBaseException)

Read = Iterator[tuple[str, Any, str]]
"""Keys and values, and how an error message refers to the two."""


def read_settings(files: Iterable[str], overrides: Iterable[str]) -> Read:
    """Yield each key and value, and how an error message refers to the two."""
    for path in files:
        for key, value in flatten(read_yaml(find_config(path), f"--config {path}")):
            yield key, value, f"--config {path}: {key}={to_yaml_value(value)}"
    for text in overrides:
        for key, value in flatten(_read_override(text)):
            yield key, value, text


def _read_override(text: str) -> dict[str, Any]:
    key, equals, typed = text.partition("=")
    if not (equals and key):
        hint = f"; write {text}=VALUE" if text in FIELDS else ""
        hint = f"; settings in a file: --config {text}; a run: checkpoint={text}" if os.path.exists(text) else hint
        raise UserError(f"{text[:200]}: expected key=value{hint}")
    if not re.fullmatch(r"\w+(\.\w+)*", key):  # OmegaConf reads brackets as more keys
        raise UserError(f"{text[:200]!r}: {unknown_key(key[:100])}")
    try:
        value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={typed}"])))["value"]
        comment = "#" in typed and _has_comment(typed)
    except YAML_ERRORS as error:
        raise UserError(f"{text[:200]}: the value is not valid YAML: {one_line(error)}") from error
    if comment:
        raise UserError(f"{text[:200]}: YAML reads # as the start of a comment; put the value in quotes: {key}='\"…\"'")
    is_string = key in FIELDS and FIELDS[key].kind is str and not FIELDS[key].choices
    return {key: typed if is_string and isinstance(value, int | float) else value}  # run.name=007 is not 7


def _has_comment(text: str) -> bool:
    """Return whether YAML reads a part of ``text`` as a comment: no token includes it."""
    end = 0
    for token in yaml.scan(text):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return False


def find_config(name: str) -> str:
    """Return the path of a file of settings: ``name`` itself, or the recipe of this name if there is no such file.

    Raise UserError if there is neither, and ``name`` does not look like a path.
    """
    if os.path.isfile(name) or Path(name).suffix or len(Path(name).parts) != 1:
        return name
    recipes = {path.stem: path for path in sorted(bundled("configs").glob("*.yaml"))}
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(recipes)}"
        raise UserError(f"--config {name}: no such file and no such recipe; {hint}")
    return str(recipes[name])


def read_yaml(path: str, name: str) -> dict[str, Any]:
    """Read a file of settings, which error messages call ``name``. Raise UserError."""
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}; give a readable YAML file") from error
    except YAML_ERRORS as error:
        reason = "too many aliases; write the values out" if "max_yaml_expanded" in str(error) else one_line(error)
        raise UserError(f"{name}: not valid YAML: {reason}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{name}: expected a mapping of settings, got a {type(loaded).__name__}")
    return cast(dict[str, Any], loaded)
