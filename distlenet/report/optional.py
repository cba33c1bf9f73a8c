"""The optional dependencies of reports and figures."""

import importlib
import logging

from distlenet.utils.errors import UserError


def require_report_packages() -> None:
    """Raise UserError if a package of ``distlenet[report]`` is not installed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the home directory cannot be written
    for name in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name}: not installed; pip install 'distlenet[report]'") from error
