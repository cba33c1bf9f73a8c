"""The command-line arguments that all commands share."""

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from distlenet.config.fields import FIELDS, default, describe
from distlenet.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong."""
        found = re.search(r"unrecognized arguments: --([\w.]+)", message)
        hint = f"; a setting is written {found[1]}=VALUE, without --" if found else ""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}{hint}")


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Read ``[--config FILE]... [key=value]...`` into the files and the overrides, each in order.

    Raises UserError for anything else; ``--help`` prints all settings and exits.
    """
    arguments = settings_parser(prog, description).parse_intermixed_args(argv)
    return arguments.config, arguments.overrides


def settings_parser(prog: str, description: str) -> Parser:
    """Make the parser of a command that takes settings; it may have options of its own, too."""
    parser = Parser(
        f"python -m {prog}",
        description=description,
        epilog="settings:\n"
        + "\n".join(f"  {key:30}[{default(key)}] {describe(key)}. {f.metadata['help']}" for key, f in FIELDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="settings as YAML; later files win"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a setting, over all files")
    return parser


def positive_int(text: str) -> int:
    """Read an option's value, at least 1, for argparse."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)
