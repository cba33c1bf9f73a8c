"""The command-line arguments that all commands share."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from distlenet.config.fields import FIELDS, to_yaml_value
from distlenet.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        match = re.search(r"unrecognized arguments: --([\w.]+)", message)
        hint = f"; a setting is written {match[1]}=VALUE or --{match[1]}=VALUE" if match else ""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}{hint}")


class SettingsParser(Parser):
    """A Parser that reads ``--key=value`` as ``key=value``; the sweep agents of W&B write settings so."""

    def parse_known_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse ``args``, with options and settings in any order."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_intermixed_args([self._strip_hyphens(word) for word in words], namespace)

    def _strip_hyphens(self, word: str) -> str:
        name, equals, _ = word.partition("=")
        return word.removeprefix("--") if equals and name not in self._option_string_actions else word


def settings_parser(prog: str, description: str) -> SettingsParser:
    """Return the parser of a command that takes settings. A command may add its own options."""
    settings = [
        f"  {key:30}[{to_yaml_value(field.default)}] {field.describe()}. {field.help}" for key, field in FIELDS.items()
    ]
    parser = SettingsParser(
        f"python -m {prog}",
        description=description,
        epilog="\n".join(["settings:", *settings]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="settings as YAML; the last file wins"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting; it wins over all files")
    return parser


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Read ``[--config FILE]... [key=value]...``; return the files and the overrides, each in order.

    Raises UserError for anything else. ``--help`` prints all settings and exits.
    """
    arguments = settings_parser(prog, description).parse_intermixed_args(argv)
    return arguments.config, arguments.overrides


def positive_int(text: str) -> int:
    """Return the value of an option as an integer of at least 1, for argparse."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer, at least 1")
    return int(text)
