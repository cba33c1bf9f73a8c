"""The versions of a model in a directory: load new ones, keep the last good one if a new one is bad."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distlenet.serve.messages import HttpError, overloaded
from distlenet.serve.served_model import BadVersion, ServedModel
from distlenet.utils.errors import UserError, warn
from distlenet.utils.version_names import version_of

KEPT = 2  # the newest version and the one before it

Stamp = tuple[tuple[int, int], ...]
"""Sizes and times of the files of a version: a bad one is tried again when they have changed."""


class Versions:
    """The loaded versions. ``directory`` holds versions, or is one, which is then the only one."""

    def __init__(self, directory: Path, file: str, threads: int) -> None:
        self.directory, self.file, self.threads = directory, file, threads
        self.is_single = (directory / "model.json").is_file()
        self.loaded: dict[int, ServedModel] = {}
        self.failures: dict[int, str] = {}
        self.failure_count = 0
        self._stamps: dict[int, Stamp] = {}  # of the versions in ``failures``

    def newest(self) -> ServedModel:
        """Return the model that answers requests without a version."""
        loaded = self.loaded  # read once: ``scan`` may replace it
        if not loaded:
            raise overloaded("no version is loaded")
        return loaded[max(loaded)]

    def get(self, version: int | None) -> ServedModel:
        """Return a version, None for the newest. Raise HttpError if it is not loaded."""
        if version is None:
            return self.newest()
        loaded = self.loaded  # as in ``newest``
        if version not in loaded:
            reason = self.failures.get(version, f"loaded are {', '.join(map(str, sorted(loaded)))}")
            raise HttpError(404, f"version {version} is not available: {reason}")
        return loaded[version]

    def start(self) -> None:
        """Load the versions. Raise UserError if none can be served."""
        self.scan()
        if not self.loaded:
            reasons = [f"version {version}: {text}" for version, text in self.failures.items()]
            raise UserError(
                f"{self.directory}: {'; '.join(reasons) or 'has no version, a directory with a number as its name'}; "
                "export a model with python -m distlenet.export RUN --to onnx --out DIR"
            )

    def scan(self) -> None:
        """Load what is new, and drop what is no longer one of the newest good versions of the directory.

        If the directory holds no good version any more, all loaded ones stay. Runs in a thread: the event loop only
        reads ``loaded`` and ``failures``, which are replaced in one assignment.
        """
        good: dict[int, ServedModel] = {}
        found = self._find()
        self.failures = {version: text for version, text in self.failures.items() if version in found}
        self._stamps = {version: stamp for version, stamp in self._stamps.items() if version in found}
        for version, path in sorted(found.items(), reverse=True):
            model = self.loaded.get(version) or self._load(version, path)
            if model is not None:
                good[version] = model
                self.loaded = {**self.loaded, version: model}  # a new version serves before an older one is loaded
            if len(good) == KEPT:
                break
        if good:
            self.loaded = good

    def _find(self) -> dict[int, Path]:
        if self.is_single:
            number = version_of(self.directory.resolve().name)  # of the current directory, too
            return {1 if number is None else number: self.directory}
        try:
            return {int(path.name): path for path in self.directory.iterdir() if _is_version(path)}
        except OSError as error:
            if not self.loaded:
                raise UserError(f"{self.directory}: cannot be read: {error.strerror}") from error
            return {}

    def _load(self, version: int, path: Path) -> ServedModel | None:
        stamp = _stamp(path, self.file)
        if self._stamps.get(version) == stamp:
            return None
        try:
            for name in ("model.json", self.file):
                _check_file(path / name)
            model = ServedModel(path, version, self.file, self.threads)
        except BadVersion as error:
            self._stamps[version] = stamp
            self.failures = {**self.failures, version: str(error)}
            self.failure_count += 1
            warn(f"{path}: this version is not served: {error}")
            return None
        self._stamps.pop(version, None)
        self.failures = {key: text for key, text in self.failures.items() if key != version}
        return model

    async def poll(self, interval_s: float) -> None:
        """Scan every ``interval_s`` seconds, until the task is cancelled."""
        thread = ThreadPoolExecutor(1, "versions")  # the end of the server does not wait for slow storage
        while not self.is_single:
            await asyncio.sleep(interval_s)
            before = self.newest()
            await asyncio.get_running_loop().run_in_executor(thread, self.scan)
            if self.newest() is not before:
                warn(f"{self.directory}: version {self.newest().version} is served now")


def _is_version(path: Path) -> bool:
    try:
        return version_of(path.name) is not None and path.is_dir()
    except OSError:
        return True  # ``_load`` reports the reason


def _check_file(path: Path) -> None:
    """Raise BadVersion if the file cannot be read; a missing one is reported by ServedModel."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe may never return
            raise BadVersion(f"{path.name}: is not a regular file")
    except OSError as error:
        raise BadVersion(f"{path.name}: cannot be read: {error.strerror}") from error


def _stamp(path: Path, file: str) -> Stamp:
    def stat(name: str) -> tuple[int, int]:
        try:
            found = (path / name).stat()
        except OSError:
            return (0, 0)
        return (found.st_size, found.st_mtime_ns)

    return (stat("model.json"), stat(file))
