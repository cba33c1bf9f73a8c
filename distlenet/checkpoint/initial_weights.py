"""The weights that a new run starts from: ``checkpoint.init_from``."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distlenet.checkpoint.archive import COMMENT_PREFIX
from distlenet.checkpoint.format import evaluation_weights, is_weights, load_checkpoint
from distlenet.checkpoint.store import find_checkpoint
from distlenet.distributed.collectives import from_rank_0
from distlenet.utils.errors import UserError, warn

MAX_NAMES = 20
"""Names of tensors that a message lists, of each kind."""


def load_initial_weights(model: nn.Module, path: str) -> Path:
    """Load the weights in ``path`` whose names and shapes fit ``model``; warn of the others. A collective.

    Rank 0 reads the file. Return it: of a run directory, the newest checkpoint. Raise UserError, on every rank, if it
    cannot be read or nothing in it fits.
    """
    file, fitting = from_rank_0(lambda: _read_fitting(model.state_dict(), path))
    model.load_state_dict(fitting, strict=False)
    return file


def _read_fitting(own: Mapping[str, Any], path: str) -> tuple[Path, dict[str, Tensor]]:
    file = find_checkpoint(path)
    saved = read_weights(path, file)
    found = f"checkpoint.init_from={path}"
    fitting = {name: t for name, t in saved.items() if name in own and getattr(own[name], "shape", None) == t.shape}
    if not fitting:
        raise UserError(
            f"{found}: no tensor has the name and the shape of one of the model's: it has {_list(saved)}; the model "
            f"has {_list(own)}; give the weights of this model"
        )
    missing, unexpected = own.keys() - saved.keys(), saved.keys() - own.keys()
    shapes = [
        f"{name} {list(saved[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in saved and name not in fitting
    ]
    if missing or unexpected or shapes:
        kinds = {
            "missing": [name for name in own if name in missing],
            "unexpected": [name for name in saved if name in unexpected],
            "of another shape": shapes,
        }
        others = "; ".join(f"{kind}: {_list(names)}" for kind, names in kinds.items() if names)
        warn(f"{found}: {len(fitting)} of the model's {len(own)} tensors are loaded; {others}")
    return file, fitting


def read_weights(path: str | Path, file: Path) -> dict[str, Tensor]:
    """Return the weights in ``file``, by name, on the CPU; no code in it is executed. Raise UserError.

    ``path`` is the setting. The file is a checkpoint of this package (its averaged weights, if it has them), or the
    ``state_dict`` of a model, as ``torch.save`` writes it, alone or in a dict under ``state_dict`` or ``model``.
    ``module.`` before all names, of a wrapper, is removed.
    """
    try:
        with open(file, "rb") as opened:
            opened.seek(0, 2)
            opened.seek(max(0, opened.tell() - 100))
            ours = COMMENT_PREFIX in opened.read()
        saved: Any = None if ours else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a file that it did not write
        reason = getattr(error, "strerror", None) or f"torch.load refuses it ({type(error).__name__})"
        raise UserError(
            f"checkpoint.init_from={path}: cannot be read: {reason}; give a checkpoint of distlenet, or a file from "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(saved, dict):
        saved = next((saved[key] for key in ("state_dict", "model") if isinstance(saved.get(key), dict)), saved)
    weights = evaluation_weights(load_checkpoint(file))["model"] if ours else saved
    if not is_weights(weights):
        raise UserError(
            f"checkpoint.init_from={path}: is a {type(weights).__name__}, not a state_dict, of tensors by name; give a "
            "file from torch.save(model.state_dict(), FILE)"
        )
    wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in weights.items()}


def _list(names: Collection[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - MAX_NAMES} more" if len(listed) > MAX_NAMES else ""
    return (", ".join(listed[:MAX_NAMES]) or "no tensors") + more
