"""Join and leave the process group."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import convert_rendezvous_errors
from distlenet.utils.errors import Preempted, UserError


@contextmanager
def process_group(
    store: Store, env: DistributedEnvironment, backend: str, device: torch.device, timeout_s: float
) -> Iterator[None]:
    """Join the default process group for the length of a ``with`` block, and leave it on every path.

    ``store`` is what ``rendezvous`` returns, ``timeout_s`` how long ranks wait for each other in a collective.
    Raises RankError where the group does not come together.
    """
    with convert_rendezvous_errors(env):
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    try:
        yield
    except (UserError, Preempted):  # raised on all ranks
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what they were told may still be on its way
        raise
    except BaseException:
        # Others may be inside a collective. Then NCCL's orderly end waits for them for ever, its abort does not.
        if backend == "nccl" and hasattr(dist.distributed_c10d, "_abort_process_group"):
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Gloo's threads end when the last reference to the group goes, which DistributedDataParallel holds
        # in a cycle. A thread that outlives the interpreter aborts it: "terminate called without an active
        # exception", exit status 134 after a run that succeeded.
        gc.collect()
