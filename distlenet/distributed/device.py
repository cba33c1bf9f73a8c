"""The device, the backend and the CUDA stream of a rank."""

import torch
import torch.distributed as dist

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError, UserError


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
            f"distributed.backend=nccl: needs a GPU for every rank and a PyTorch with NCCL, "
            f"but this rank is on {device.type}; set distributed.backend=auto or gloo"
        )
    return ("nccl" if nccl else "gloo") if wanted == "auto" else wanted


def use_side_stream(device: torch.device) -> None:
    """Make a new CUDA stream current for this process: the default stream cannot be captured in a CUDA graph."""
    torch.cuda.set_stream(torch.cuda.Stream(device))
