"""The optional dependencies of reports and figures."""

import importlib
import importlib.util
import logging

from distlenet.utils.errors import UserError

PACKAGES = ("matplotlib", "jinja2")


def missing_report_package() -> str:
    """Return the message about a package that is not installed, or an empty string. Imports none, which is slow."""
    return next((not_installed(name) for name in PACKAGES if importlib.util.find_spec(name) is None), "")


def not_installed(name: str) -> str:
    """Return the message about a missing package."""
    return f"{name}: not installed; pip install 'distlenet[report]'"


def require_report_packages() -> None:
    """Raise UserError if a package of ``distlenet[report]`` is not installed."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the home directory cannot be written
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(not_installed(name)) from error
