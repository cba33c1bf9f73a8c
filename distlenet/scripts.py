"""``python -m distlenet.scripts DIRECTORY``: write the launch scripts, the batch scripts and the manifests."""

import shutil
from pathlib import Path

from distlenet import __version__
from distlenet.distributed.entry_point import run_entry
from distlenet.utils.bundled import bundled
from distlenet.utils.errors import UserError
from distlenet.utils.parser import Parser

PARTS = ("launch", "slurm")
IMAGES = ("Containerfile", "distlenet.def")
"""Definitions of images in ``launch/``, which copy the checkout: they cannot be built elsewhere."""


def main() -> None:
    """Copy the files, and print what was written."""
    parser = Parser("python -m distlenet.scripts", description="Write launch scripts, batch scripts and manifests.")
    parser.add_argument("directory", type=Path, help="where to create launch/ and slurm/; submit jobs from there")
    for path in write_scripts(parser.parse_args().directory):
        print(path)


def write_scripts(directory: Path) -> list[Path]:
    """Write ``launch/`` and ``slurm/`` to ``directory``, without ``IMAGES``; return the files.

    Raise UserError rather than overwrite one. The second line of a file has the version.
    """
    targets: dict[Path, Path] = {}
    for source in map(bundled, PARTS):
        files = sorted(path for path in source.rglob("*") if path.is_file() and path.name not in IMAGES)
        targets |= {path: directory / source.name / path.relative_to(source) for path in files}
    if exists := next((target for target in targets.values() if target.exists()), None):
        raise UserError(f"{exists}: exists already; give another directory, or move it away to get a new one")
    try:
        for source, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            first, rest = source.read_text().split("\n", 1)
            target.write_text(f"{first}\n# Written by distlenet {__version__}.\n{rest}")
            shutil.copymode(source, target)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise UserError(f"{error.filename or directory}: {reason}; give another directory") from error
    return list(targets.values())


if __name__ == "__main__":
    run_entry(main)
