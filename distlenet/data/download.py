"""Getting Fashion-MNIST and MNIST onto this machine, once, whoever else wants them too."""

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distlenet.data import idx
from distlenet.utils.errors import UserError

TORCHVISION_CLASS = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST"}
DEBIAN_PACKAGE = {"fashion_mnist": "dataset-fashion-mnist"}
DEBIAN_FOLDER = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}

STALLED_S = 20.0  # seconds without a byte after which a download is given up
LOCK_S = 1800.0  # seconds that a process waits while another one downloads


def locate(name: str, root: Path) -> dict[str, Path] | None:
    """Find the four IDX files: in ``root``, in torchvision's folder below it, in Debian's package."""
    folders = [root, downloaded_folder(name, root), DEBIAN_FOLDER.get(name)]
    if os.path.lexists(root) and not os.path.isdir(root):
        raise UserError(f"data.root={root}: is not a folder that can be read; give another")
    return next((files for folder in folders if folder and (files := idx.find(folder))), None)


def downloaded_folder(name: str, root: Path) -> Path:
    """Where downloads are kept: the layout of ``torchvision.datasets``."""
    return root / TORCHVISION_CLASS[name] / "raw"


def locate_or_download(name: str, root: Path, debian: bool = False) -> dict[str, Path]:
    """Find the four IDX files, or download them into ``root`` by torchvision.

    One process downloads, whether the others are on this node or share the folder from elsewhere; they
    wait, then find. With ``debian``, Debian's package is the last resort (see ``_by_debian``).
    Raises UserError that lists the ways where none works.
    """
    if files := locate(name, root):
        return files
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock", timeout=LOCK_S):
            return locate(name, root) or _download(name, root, debian)
    except UserError:
        if made:  # a name that was mistyped, perhaps
            shutil.rmtree(root, ignore_errors=True)
        raise
    except Timeout as error:
        raise UserError(
            f"data {error.lock_file}: is held by another process; wait for it, or remove the file if there is none"
        ) from error
    except OSError as error:
        raise UserError(f"data.root={root}: cannot be written: {error.strerror or error}; give another") from error


def _download(name: str, root: Path, debian: bool) -> dict[str, Path]:
    attempts = [_by_torchvision] + ([_by_debian] if debian and name in DEBIAN_PACKAGE else [])
    failures = []
    for attempt in attempts:
        # Into a folder of its own, then one rename: nobody ever sees half a file.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as scratch:
            try:
                fetched = attempt(name, Path(scratch))
            except (OSError, RuntimeError, http.client.HTTPException, subprocess.SubprocessError) as error:
                failures.append(_reason(error))
                continue
            target = downloaded_folder(name, root)
            target.parent.mkdir(parents=True, exist_ok=True)
            fetched.rename(target)
            files = idx.find(target)
            assert files is not None, f"nothing in {target} after a download that reported success"
            return files
    ways = [f"put its four IDX files (plain or .gz) into {root}"]
    if name in DEBIAN_PACKAGE:
        ways.append(f"apt install {DEBIAN_PACKAGE[name]}")
    ways += [
        f"python -m distlenet.data data.name={name} on a machine with a network",
        "train on the bundled set with data.name=digits, for which configs/ci.yaml has the settings",
    ]
    raise UserError(
        f"data.name={name}: is not in data.root={root} and cannot be downloaded ({', '.join(failures)}); "
        + ", or ".join(ways)
    )


def _by_torchvision(name: str, scratch: Path) -> Path:
    """Download and verify (MD5 of the .gz files) with torchvision; keep the .gz files only."""
    import torchvision.datasets  # takes seconds to import, and is needed nowhere else

    with _socket_timeout(STALLED_S):
        dataset = getattr(torchvision.datasets, TORCHVISION_CLASS[name])(scratch, download=True)
    folder = Path(dataset.raw_folder)
    for plain in idx.FILES:
        (folder / plain).unlink()
    return folder


def _by_debian(name: str, scratch: Path) -> Path:
    """Unpack Debian's package, as apt-get gets it; needs no root, since nothing is installed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise RuntimeError("no apt-get and dpkg here")
    for command in (["apt-get", "download", "-q", DEBIAN_PACKAGE[name]], ["dpkg", "-x", "PACKAGE", "."]):
        packages = [path.name for path in scratch.glob("*.deb")]
        line = [word for part in command for word in (packages if part == "PACKAGE" else [part])]
        subprocess.run(line, cwd=scratch, check=True, capture_output=True, text=True, timeout=600)
    return scratch / DEBIAN_FOLDER[name].relative_to("/")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound each wait for the network: urllib, which torchvision uses, else waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return text.strip().splitlines()[-1] if text.strip() else type(error).__name__
