"""Locate Fashion-MNIST or MNIST on this machine, or download it; one process downloads at a time."""

import http.client
import os
import socket
import subprocess
from contextlib import suppress
from itertools import islice
from pathlib import Path

from filelock import FileLock

from distlenet.config.schema import DataConfig
from distlenet.data.idx import FILES, find_files
from distlenet.images.decoding import IMAGE_SUFFIXES
from distlenet.utils.errors import UserError
from distlenet.utils.files import scratch_directory

TORCHVISION_CLASS = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}
DEBIAN_PACKAGE = {"fashion_mnist": "dataset-fashion-mnist"}
DEBIAN_DIRECTORY = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}

SOCKET_TIMEOUT_S = 20.0  # a download that receives nothing for this long is given up
HINT_DIRECTORIES = 100  # searched for images, for a message

LOCK_TIMEOUT_S = 1800.0  # how long a process waits for another one's download


def searched_directories(name: str, root: Path) -> list[Path]:
    """Return where the files of a data set are searched for: Debian's package only if ``data.root`` is the default."""
    directories = [root, torchvision_directory(name, root)]
    if is_default(root) and name in DEBIAN_DIRECTORY:
        directories.append(DEBIAN_DIRECTORY[name])
    return directories


def is_default(root: Path) -> bool:
    """Return whether ``data.root`` is the default: nothing else was given."""
    return root == Path(DataConfig().root)


def locate(name: str, root: Path) -> dict[str, Path] | None:
    """Return the four files, from the first of ``searched_directories`` that contains them, or None."""
    if os.path.lexists(root) and not (os.path.isdir(root) and os.access(root, os.R_OK | os.X_OK)):
        raise UserError(f"data.root={root}: is not a readable directory{hint(root)}; give another")
    return next((files for path in searched_directories(name, root) if (files := find_files(path))), None)


def torchvision_directory(name: str, root: Path) -> Path:
    """Return the directory in which ``torchvision.datasets`` keeps its downloads."""
    return root / TORCHVISION_CLASS[name] / "raw"


def not_found(name: str, root: Path) -> str:
    """Return the start of a message: where the data set was searched for, and what ``root`` contains instead."""
    places = ", ".join(map(str, searched_directories(name, root)))
    return f"data.name={name}: its four IDX files (plain or .gz) are not in {places}{hint(root)}"


def hint(root: Path) -> str:
    """Return which other data set ``root`` seems to contain, or an empty string."""
    with suppress(OSError):
        if root.suffix in (".npz", ".npy"):
            return f"; for arrays, give data.name=array data.root={root}"
        for directory, _, names in islice(os.walk(root), HINT_DIRECTORIES):
            suffixes = {Path(file).suffix.lower() for file in names}
            if suffixes & IMAGE_SUFFIXES:
                return f"; {directory} contains images: for a directory per class, give data.name=folder"
            if ".tar" in suffixes:
                return f"; {directory} contains archives: for WebDataset shards, give data.name=tar"
            if suffixes & {".npz", ".npy"}:
                return f"; {directory} contains arrays: give data.name=array data.root=FILE"
    return ""


def locate_or_download(name: str, root: Path, fetch: bool) -> dict[str, Path]:
    """Locate the four files, or download them into ``root`` while other processes that share it wait.

    Download only into the default ``data.root``, with torchvision, unless ``fetch``: then into any, and also from
    Debian's package. Raise UserError if the files are not there and cannot be downloaded.
    """
    if files := locate(name, root):
        return files
    if not (fetch or is_default(root)):
        raise UserError(
            f"{not_found(name, root)}; give the data.root that holds them, or python -m distlenet.data "
            f"data.name={name} data.root={root} to download them there"
        )
    created, lock = not root.exists(), root / f".{name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            return locate(name, root) or _download(name, root, fetch)
    except UserError:
        if created:  # data.root may be mistyped
            with suppress(OSError):  # not empty: another process has put its data there
                lock.unlink(missing_ok=True)
                root.rmdir()
        raise
    except OSError as error:  # also a timeout of the lock
        raise UserError(f"data.root={root}: cannot be written: {error.strerror or error}; give another") from error


def _download(name: str, root: Path, debian: bool) -> dict[str, Path]:
    failures = []
    for source in [_torchvision, _debian] if debian and name in DEBIAN_PACKAGE else [_torchvision]:
        with scratch_directory(root, f".download-{name}-") as scratch:
            try:
                downloaded = source(name, scratch)
            except (OSError, RuntimeError, http.client.HTTPException, subprocess.SubprocessError) as error:
                text = (getattr(error, "stderr", None) or str(error)).strip() or type(error).__name__
                failures.append(text.splitlines()[-1])
                continue
            target = torchvision_directory(name, root)
            target.parent.mkdir(parents=True, exist_ok=True)
            downloaded.rename(target)  # other processes see all files or none
        files = find_files(target)
        assert files is not None, f"no data in {target} after a successful download"
        return files
    package = f"apt install {DEBIAN_PACKAGE[name]}, or " if name in DEBIAN_PACKAGE else ""
    raise UserError(
        f"{not_found(name, root)}, and cannot be downloaded ({', '.join(failures)}); "
        f"put them into {root}, or {package}python -m distlenet.data data.name={name} "
        f"data.root={root} on a machine with a network, or train on the bundled digits with --config ci"
    )


def _torchvision(name: str, scratch: Path) -> Path:
    """Download with torchvision, which verifies the MD5 of the .gz files; keep only those."""
    import torchvision.datasets  # slow to import, and used nowhere else

    default_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_S)  # torchvision sets none
    try:
        getattr(torchvision.datasets, TORCHVISION_CLASS[name])(scratch, download=True)
    finally:
        socket.setdefaulttimeout(default_timeout)
    for file in FILES:
        (torchvision_directory(name, scratch) / file).unlink()
    return torchvision_directory(name, scratch)


def _debian(name: str, scratch: Path) -> Path:
    """Download Debian's package and extract it; this installs nothing and needs no root."""

    def run(*command: str) -> None:
        subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=600)

    run("apt-get", "download", "-q", DEBIAN_PACKAGE[name])
    run("dpkg", "-x", *(path.name for path in scratch.glob("*.deb")), ".")
    return scratch / DEBIAN_DIRECTORY[name].relative_to("/")
