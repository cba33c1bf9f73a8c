"""What one rank sees by itself: versions, device, names and addresses, limits. Nothing here waits for others."""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from distlenet import __version__
from distlenet.config.loading import result_settings
from distlenet.config.schema import Config
from distlenet.distributed.address import first_host
from distlenet.distributed.device import resolve_backend, resolve_device
from distlenet.distributed.environment import DistributedEnvironment, threads_from_environ
from distlenet.distributed.precision import resolve_precision
from distlenet.utils.errors import UserError

SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Facts:
    """One rank's view, in plain values."""

    rank: int
    node_rank: int
    local_rank: int
    local_world_size: int
    host: str
    versions: dict[str, str]
    settings: str  # a digest of what changes the result
    device: str
    gpu: str  # the physical device, empty on the CPU
    gpus: int  # that this process sees
    refused: str  # why device, backend or precision cannot be; empty where they can
    backend: str
    precision: str
    cores: int  # that this process may run on
    threads: int
    address: str  # under which other nodes would find this one; empty where its name does not resolve
    loopback: bool  # whether that address is this machine's own alone
    interface: str  # the one that reaches rank 0
    pinned: str  # GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, as far as set
    shm_bytes: int
    open_files: int

    def to_json(self) -> str:
        """Write it for ``from_json``."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Facts":
        """Read what ``to_json`` wrote."""
        return Facts(**json.loads(text))


def look(config: Config, env: DistributedEnvironment, environ: Mapping[str, str] = os.environ) -> Facts:
    """See what there is to see for a rank."""
    refused, backend, precision, device, threads = "", "gloo", "fp32", torch.device("cpu"), 1
    try:
        device = resolve_device(config.device, env, torch.cuda.device_count())
        backend = resolve_backend(config.distributed.backend, device)
        precision = resolve_precision(config.precision, device)
        threads = config.distributed.threads or threads_from_environ(environ) or 1
    except UserError as error:
        refused = str(error)
    name = f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
    address, loopback = own_address(environ.get("GLOO_SOCKET_IFNAME", "") if backend == "gloo" else "")
    return Facts(
        rank=env.rank,
        node_rank=env.node_rank,
        local_rank=env.local_rank,
        local_world_size=env.local_world_size,
        host=socket.gethostname(),
        versions=versions(),
        settings=digest(config),
        device=str(device),
        gpu=gpu_id(device),
        gpus=torch.cuda.device_count(),
        refused=refused,
        backend=backend,
        precision=precision,
        cores=len(os.sched_getaffinity(0)),
        threads=threads,
        address=address,
        loopback=loopback,
        interface=interface_to(first_host(env)),
        pinned=environ.get(name, ""),
        shm_bytes=shutil.disk_usage(SHM).free if SHM.is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def versions() -> dict[str, str]:
    """Return the versions that must be alike on all ranks."""
    found = {"distlenet": __version__, "Python": platform.python_version(), "torch": str(torch.__version__)}
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def digest(config: Config) -> str:
    """Shorten the settings that change the result."""
    text = json.dumps(result_settings(config.to_dict()), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def gpu_id(device: torch.device) -> str:
    """Name a GPU as no other GPU of its node is named, whatever number a process gives it."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def now() -> float:
    """Return this machine's time, seconds since 1970."""
    return time.time()


def own_address(interface: str) -> tuple[str, bool]:
    """Return the address under which Gloo is found by others, and whether it reaches no farther than this machine.

    That of the interface in GLOO_SOCKET_IFNAME, else what the host's own name resolves to: on Debian and its kin
    /etc/hosts often says 127.0.1.1. Empty where there is none.
    """
    if interface:
        found = [a.address for a in psutil.net_if_addrs().get(interface, []) if a.family == socket.AF_INET]
    else:
        try:
            listed = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        except OSError:
            listed = []
        found = [str(entry[4][0]) for entry in listed]
    address = found[0] if found else ""
    return address, address.startswith("127.") or address == "::1"


def route_address(host: str) -> str:
    """Return this machine's own address on the way to ``host``; empty where that cannot be told."""
    if not host:
        return ""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)  # of UDP: chooses a route, sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interface_to(host: str) -> str:
    """Name the network interface by which ``host`` is reached; empty where that cannot be told."""
    own = route_address(host)
    for name, addresses in psutil.net_if_addrs().items():
        if own and any(address.address == own for address in addresses):
            return str(name)
    return ""
