"""The data and the user's code that a run was made with, by digests: a run is not resumed with others."""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distlenet.config.fields import FIELDS
from distlenet.config.loading import result_settings
from distlenet.config.names import is_import_name
from distlenet.config.schema import Config
from distlenet.data.batched_dataset import read_samples
from distlenet.distributed.collectives import broadcast_object, raise_on_all_ranks
from distlenet.task import Datasets, Task
from distlenet.utils.errors import UserError
from distlenet.utils.nested import tensors_in

SAMPLED = 16  # samples of each set that are part of its digest, evenly spaced
LIBRARIES = {"torch", "torchvision", "numpy", "PIL", "distlenet", *sys.stdlib_module_names} - {"__main__"}


@dataclass(frozen=True)
class Origin:
    """Digests of the data, by split, and of the source files of the user's code, by module."""

    data: dict[str, str]
    code: dict[str, str]

    def to_dict(self) -> dict[str, dict[str, str]]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    def digest(self) -> str:
        """Return 8 hex digits that identify the origin."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]


def origin_of(config: Config, task: Task, model: nn.Module, datasets: Datasets) -> Origin:
    """Return the origin of a run. Raise UserError, on every rank, if a rank has other data or code. A collective."""
    objects = [task, *model.modules(), *_splits(datasets).values()]
    own = Origin(_data_digests(config, task, datasets), _code_digests(config, objects))
    first = broadcast_object(own)
    with raise_on_all_ranks():
        for kind in ("data", "code"):
            if changes := _changes(getattr(first, kind), getattr(own, kind), "on rank 0", "on this rank"):
                raise UserError(f"the {kind} differs between ranks: {changes}; give all nodes the same {kind}")
    return own


def check_origin(saved: Any, origin: Origin, config: Config, batch: int) -> None:
    """Raise UserError if a checkpoint's origin differs, unless ``checkpoint.allow_changed`` contains data or code.

    ``saved`` is what ``to_dict`` returned, or None in a checkpoint of an earlier version; ``batch`` is the number of
    batches into an epoch.
    """
    if not isinstance(saved, Mapping):
        return
    for kind in ("data", "code"):
        changes = _changes(saved.get(kind, {}), getattr(origin, kind), "in the checkpoint", "now")
        if changes and kind not in config.checkpoint.allow_changed:
            raise UserError(
                f"the {kind} is not that of the checkpoint: {changes}; give another run.name, or "
                f"checkpoint.allow_changed=[{kind}] to resume anyway"
            )
        if changes and kind == "data" and batch:
            raise UserError(
                f"the data is not that of the checkpoint: {changes}; the checkpoint is {batch} batches into an epoch, "
                "so some samples would be repeated and others skipped; resume from the end of an epoch"
            )


def _changes(old: Mapping[str, str], new: Mapping[str, str], where_old: str, where_new: str) -> str:
    """Return in words what differs, or an empty string."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{n} ({old.get(n, 'absent')} {where_old}, {new.get(n, 'absent')} {where_new})" for n in names)


def _splits(datasets: Datasets) -> dict[str, Any]:
    splits = {"train": datasets.train, "val": datasets.validation, "test": datasets.test}
    return {name: dataset for name, dataset in splits.items() if dataset is not None}


def _data_digests(config: Config, task: Task, datasets: Datasets) -> dict[str, str]:
    """Return the fingerprint of the source, or else one by the number of samples, some samples and the classes."""
    if datasets.fingerprint is not None:
        return dict(datasets.fingerprint)
    digests = {}
    for name, dataset in _splits(datasets).items():
        count = len(dataset)
        wanted = min(count, SAMPLED)
        rows = torch.tensor([k * (count - 1) // max(wanted - 1, 1) for k in range(wanted)])
        digest = hashlib.sha256()
        for tensor in tensors_in([read_samples(dataset, task.collate, config.seed, row) for row in rows.split(1)]):
            dense = tensor.detach().cpu().contiguous()
            digest.update(f"{dense.dtype} {tuple(dense.shape)}".encode())
            digest.update(dense.flatten().view(torch.uint8).numpy().tobytes())
        digests[name] = f"{count} samples {digest.hexdigest()[:16]}"
    if datasets.classes is not None:
        digests["classes"] = ", ".join(datasets.classes)
    return digests


def _code_digests(config: Config, objects: Iterable[Any]) -> dict[str, str]:
    named = [
        value.partition(":")[0]
        for key, value in result_settings(config.to_dict()).items()
        if FIELDS[key].names and is_import_name(value)
    ]
    classes = [base.__module__ for each in objects for base in type(each).__mro__]
    files = dict(_with_imports({*named, *classes}))
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest()[:16] for name in sorted(files)}


def _with_imports(names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield the modules ``names`` and what they import from their own directories, with their files; no libraries."""
    pending, seen = list(names), set[str]()
    while pending:
        name = pending.pop()
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or "")
        if name in seen or name.partition(".")[0] in LIBRARIES or module is None or file.suffix != ".py":
            continue
        seen.add(name)
        yield name, file.resolve()
        pending += [other for other in _imports(module, file) if _directory(other) == _directory(name)]


def _imports(module: ModuleType, file: Path) -> Iterator[str]:
    """Yield the names of modules that a source file may import."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.__package__ or ""
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def _directory(name: str) -> Path | str | None:
    """Return the directory that holds a module's top-level package; the package, if many share that directory."""
    top = name.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return None
    directory = Path(file).resolve().parents[name.count(".") + (Path(file).name == "__init__.py")]
    return top if directory.name in ("site-packages", "dist-packages") else directory
