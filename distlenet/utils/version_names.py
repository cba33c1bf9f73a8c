"""The names of the versions of an exported model, which are directories."""

import re

VERSION_NAME = re.compile(r"0|[1-9][0-9]{0,17}")  # fits 64 bits, as in other servers


def version_of(name: str) -> int | None:
    """Return the number of a version, at most 18 digits; None for other names, such as ``01``."""
    return int(name) if VERSION_NAME.fullmatch(name) else None
