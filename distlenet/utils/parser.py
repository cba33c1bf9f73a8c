"""Command-line arguments."""

import argparse
import re
from typing import NoReturn

from distlenet.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        match = re.search(r"unrecognized arguments: --([\w.]+)", message)
        hint = f"; a setting is written {match[1]}=VALUE or --{match[1]}=VALUE" if match else ""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}{hint}")


def positive_int(text: str) -> int:
    """Return the value of an option as an integer of at least 1, for argparse."""
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected an integer, at least 1")
