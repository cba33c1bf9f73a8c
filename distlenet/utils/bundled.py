"""Directories outside the code that the installed package includes: recipes, launch scripts and batch scripts."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def bundled(name: str) -> Path:
    """Return the directory ``configs``, ``launch`` or ``slurm`` of the installed package, else that of the checkout."""
    installed = PACKAGE / "bundled" / name
    return installed if installed.is_dir() else PACKAGE.parent / name
