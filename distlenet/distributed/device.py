"""The device, backend and precision of a rank: pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from distlenet.distributed.rendezvous import format_ranks
from distlenet.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VisibleGpus(NamedTuple):
    """The GPUs that a rank may use."""

    host: str
    uuids: list[str]  # by device index; identical on all ranks that see the same GPU
    bf16: list[bool]  # by device index: whether the GPU supports bf16


class DeviceChoice(NamedTuple):
    """The device of a rank."""

    device: str  # cpu, or cuda with an index
    warning: str = ""  # why visible GPUs are not used
    error: str = ""  # why there is no such device
    bf16: bool = True  # whether the devices of all ranks support bf16


def resolve_devices(wanted: str, ranks: Sequence[VisibleGpus]) -> list[DeviceChoice]:
    """Return the device of each rank: a GPU for every rank, or the CPU for all.

    Each rank, in order, takes the first GPU that it sees and that no lower rank has taken. So ranks that see all GPUs
    of their node take one each, and a rank that sees a single GPU takes that one. If a GPU is missing, it is an error
    with cuda; with auto it is one only if another host has enough.
    """
    hosts = [rank.host for rank in ranks]
    if wanted == "cpu" or (wanted == "auto" and not any(rank.uuids for rank in ranks)):
        return [DeviceChoice("cpu")] * len(ranks)
    taken: set[tuple[str, str]] = set()
    indices: list[int | None] = []
    for rank in ranks:
        index = next((i for i, uuid in enumerate(rank.uuids) if (rank.host, uuid) not in taken), None)
        taken |= set() if index is None else {(rank.host, rank.uuids[index])}
        indices.append(index)
    if None not in indices:
        bf16 = all(rank.bf16[index] for rank, index in zip(ranks, indices, strict=True) if index is not None)
        return [DeviceChoice(f"cuda:{index}", bf16=bf16) for index in indices]
    missing, fix = _missing_gpus(ranks, indices)
    if wanted == "cuda":
        choice = DeviceChoice("cpu", error=f"device=cuda: {missing}; {fix}, or set device=cpu")
    elif {host for host, index in zip(hosts, indices, strict=True) if index is None} == set(hosts):
        choice = DeviceChoice("cpu", f"device=auto: training on the CPU, since {missing}; {fix}")
    else:
        choice = DeviceChoice("cpu", error=f"device=auto: {missing}, but others have one; {fix}, or set device=cpu")
    return [choice] * len(ranks)


def _missing_gpus(ranks: Sequence[VisibleGpus], indices: Sequence[int | None]) -> tuple[str, str]:
    """Return what is wrong on the first host with a rank without a GPU, whose index is None, and a fix."""
    host = ranks[indices.index(None)].host
    local = [number for number, rank in enumerate(ranks) if rank.host == host]
    count = len({uuid for number in local for uuid in ranks[number].uuids})
    if 0 < count < len(local):
        return f"{len(local)} ranks on {host} share {count} GPU{'s' * (count > 1)}", "start one rank per GPU"
    without = format_ranks([number for number in local if indices[number] is None])
    found = f"PyTorch sees no {'unused ' * (count > 0)}GPU on {host} for {without}"
    return found, "check CUDA_VISIBLE_DEVICES and the driver"


def resolve_backend(wanted: str, device: torch.device) -> str:
    """Return nccl for a rank on a GPU, else gloo. Raise UserError if ``wanted`` is nccl and it cannot work."""
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if wanted == "nccl" and not nccl:
        raise UserError(
            "distributed.backend=nccl: needs a GPU for every rank and a PyTorch with NCCL; "
            "set distributed.backend=auto or gloo"
        )
    return ("nccl" if nccl else "gloo") if wanted == "auto" else wanted


def resolve_precision(wanted: str, device: torch.device, bf16: bool) -> str:
    """Resolve ``auto`` to bf16 on GPUs that all support it, else to fp16; to fp32 on CPU.

    Raise UserError if ``wanted`` is not supported.
    """
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("precision=fp16: needs a GPU; on CPU set precision=fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    if wanted == "bf16" and not bf16:
        raise UserError("precision=bf16: a GPU of this job does not support bf16; set precision=fp16 or fp32")
    return ("bf16" if bf16 else "fp16") if wanted == "auto" else wanted


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
