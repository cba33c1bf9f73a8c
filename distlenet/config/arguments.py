"""The arguments of commands that take settings."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from distlenet.config.fields import FIELDS, nearest_key, to_yaml_value
from distlenet.utils.parser import Parser


class SettingsParser(Parser):
    """A Parser that reads ``--key=value`` as ``key=value``; the sweep agents of W&B write settings so."""

    def parse_known_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse ``args``, with options and settings in any order."""
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            if "=" in word and word.partition("=")[0] not in self._option_string_actions:
                words[index] = word.removeprefix("--")
        return super().parse_known_intermixed_args(words, namespace)

    def nearest(self, name: str) -> str:
        """Return the option or the setting that ``--name`` may stand for, or an empty string."""
        if option := super().nearest(name):
            return option
        key = nearest_key(name.replace("-", "_"))
        return key and f"{key}=VALUE"


def settings_parser(prog: str, description: str) -> SettingsParser:
    """Return the parser of a command that takes settings. A command may add its own options."""
    settings = [f"  {key:42} [{to_yaml_value(f.default)}] {f.describe()}. {f.help}" for key, f in FIELDS.items()]
    parser = SettingsParser(
        f"python -m {prog}",
        description=description,
        epilog="\n".join(["settings:", *settings]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="YAML file, or the name of a recipe such as tutorial; may be repeated, later ones override earlier ones",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting; it wins over all files")
    return parser


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Return the files and the overrides of ``[--config FILE]... [key=value]...``. Raise UserError if it is wrong."""
    arguments = settings_parser(prog, description).parse_intermixed_args(argv)
    return arguments.config, arguments.overrides
