"""The device and the backend of a rank."""

import torch
import torch.distributed as dist

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.errors import RankError, UserError


def resolve_device(wanted: str, env: DistributedEnvironment, gpus: int) -> torch.device:
    """Choose this rank's device: the GPU of its local rank, or the CPU where not each local rank has one.

    ``wanted`` is auto, cpu or cuda; ``gpus`` is how many GPUs this process sees.
    Raises RankError where GPUs are asked for and there is not one for each local rank.
    """
    if env.own_gpu and gpus == 1 and wanted != "cpu":
        return torch.device("cuda", 0)
    if wanted == "cpu" or (wanted == "auto" and gpus < env.local_world_size):
        return torch.device("cpu")
    if gpus == 0:
        raise RankError("device=cuda: no GPU is visible to PyTorch here; give device=cpu, or check the driver")
    if gpus < env.local_world_size:
        raise RankError(
            f"device=cuda: {env.local_world_size} ranks on this node but {gpus} visible GPUs; start at most {gpus} "
            "ranks per node, or give device=cpu"
        )
    return torch.device("cuda", env.local_rank)


def resolve_backend(wanted: str, device: torch.device) -> str:
    """Choose NCCL for ranks on GPUs of their own, else Gloo.

    Raises UserError where NCCL is asked for and cannot work; it never turns into Gloo silently.
    """
    nccl = device.type == "cuda" and dist.is_nccl_available()
    if wanted == "nccl" and not nccl:
        raise UserError(
            f"distributed.backend=nccl: needs a GPU for every rank and a PyTorch with NCCL, "
            f"but this rank is on {device.type}; give distributed.backend=auto or gloo"
        )
    return ("nccl" if nccl else "gloo") if wanted == "auto" else wanted


def use_side_stream(device: torch.device) -> None:
    """Have this process compute on a stream of its own from now on: the default one cannot be recorded."""
    torch.cuda.set_stream(torch.cuda.Stream(device))
