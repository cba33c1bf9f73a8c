"""The device, backend and precision of a rank."""

import torch
import torch.distributed as dist

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(wanted: str, env: DistributedEnvironment, gpus: int) -> torch.device:
    """Return the GPU of this local rank, or the CPU if ``wanted`` is cpu, or auto with fewer ``gpus`` than local ranks.

    Raise RankError if ``wanted`` is cuda and this process sees fewer ``gpus`` than local ranks.
    """
    if env.own_gpu and gpus == 1 and wanted != "cpu":
        return torch.device("cuda", 0)
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world_size):
        return torch.device("cpu")
    if gpus == 0:
        raise RankError("device=cuda: PyTorch sees no GPU; set device=cpu, or check the driver")
    if gpus < env.local_world_size:
        raise RankError(
            f"device=cuda: {env.local_world_size} ranks on this node but {gpus} visible GPUs; start at most {gpus} "
            "ranks per node, or set device=cpu"
        )
    return torch.device("cuda", env.local_rank)


def resolve_backend(wanted: str, device: torch.device) -> str:
    """Return nccl for a rank on a GPU, else gloo. Raise UserError if ``wanted`` is nccl and it cannot work."""
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if wanted == "nccl" and not nccl:
        raise UserError(
            "distributed.backend=nccl: needs a GPU for every rank and a PyTorch with NCCL; "
            "set distributed.backend=auto or gloo"
        )
    return ("nccl" if nccl else "gloo") if wanted == "auto" else wanted


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Resolve ``auto`` to bf16 or fp16 on a GPU, fp32 on CPU. Raise UserError if ``wanted`` is not supported."""
    if device.type == "cpu":
        if wanted == "fp16":
            raise UserError("precision=fp16: needs a GPU; on CPU set precision=fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not bf16:
        raise UserError("precision=bf16: this GPU does not support bf16; set precision=fp16 or fp32")
    return ("bf16" if bf16 else "fp16") if wanted == "auto" else wanted


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler, enabled for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
