"""Command-line arguments."""

import argparse
import difflib
import re
from typing import NoReturn

from distlenet.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        match = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        nearest = self.nearest(match[1]) if match else ""
        hint = f"; did you mean {nearest}?" if nearest else "; --help lists all" if match else ""
        raise UserError(f"{self.prog}: {message.removeprefix('argument ')}{hint}")

    def nearest(self, name: str) -> str:
        """Return the option that ``--name`` may stand for, or an empty string."""
        options = {option.lstrip("-"): option for option in self._option_string_actions}
        return next((options[close] for close in difflib.get_close_matches(name, options, n=1)), "")


def positive_int(text: str) -> int:
    """Return the value of an option as an integer of at least 1, for argparse."""
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text}: expected an integer, at least 1")
