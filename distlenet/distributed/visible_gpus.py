"""The agreement of all ranks on their devices, through the store of the rendezvous."""

import json
import socket
import time

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.distributed.device import DeviceChoice, VisibleGpus, resolve_devices
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import convert_rendezvous_errors, wait_for_ranks


def visible_gpus(wanted: str) -> VisibleGpus:
    """Return the GPUs that this process may use, none if ``wanted`` is cpu: then CUDA is not initialized."""
    count = 0 if wanted == "cpu" else torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    bf16 = [torch.version.hip is not None or gpu.major >= 8 for gpu in gpus]  # as torch.cuda.is_bf16_supported
    return VisibleGpus(socket.gethostname(), [str(gpu.uuid) for gpu in gpus], bf16)


def agree_on_device(
    wanted: str,
    gpus: VisibleGpus,
    env: DistributedEnvironment,
    store: Store,
    timeout_s: float,
    setting: str = "distributed.init_timeout_s",
) -> DeviceChoice:
    """Return the device of this rank, which sees ``gpus``; rank 0 assigns the GPUs of all ranks, which must call this.

    Before the process group, whose backend depends on the device. Raise RankError if a rank does not answer within
    ``timeout_s`` seconds, the value of ``setting``.
    """
    deadline = time.monotonic() + timeout_s
    seen, devices, read = ([f"{name}/{rank}" for rank in range(env.world_size)] for name in ("gpus", "device", "read"))
    with convert_rendezvous_errors(env):
        store.set(seen[env.rank], json.dumps(gpus))
        if env.rank == 0:
            wait_for_ranks(store, seen, deadline, env, setting)
            ranks = [VisibleGpus(*json.loads(value)) for value in store.multi_get(seen)]
            for key, choice in zip(devices, resolve_devices(wanted, ranks), strict=True):
                store.set(key, json.dumps(choice))
        wait_for_ranks(store, seen, deadline, env, setting, answer=devices[env.rank])
        own = DeviceChoice(*json.loads(store.get(devices[env.rank])))
        store.set(read[env.rank], "")
        if env.rank == 0:  # it may hold the store, and end with an error next
            wait_for_ranks(store, read, deadline, env, setting)
    return own
