"""Observations of a single rank: versions, device, addresses, limits."""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil
import torch

from distlenet import __version__
from distlenet.config.loading import result_settings
from distlenet.config.schema import Config
from distlenet.distributed.device import DeviceChoice, resolve_backend, resolve_precision
from distlenet.distributed.environment import DistributedEnvironment, threads_from_environ
from distlenet.utils.errors import UserError


@dataclass(frozen=True)
class RankInfo:
    """One rank's observations, in plain values."""

    rank: int
    node_rank: int
    local_rank: int
    local_world_size: int
    versions: dict[str, str]
    settings: str  # a digest of the settings that change the result
    device: str
    device_error: str  # why device, backend or precision is not available, or ""
    device_warning: str  # why visible GPUs are not used, or ""
    backend: str
    precision: str
    threads: int
    address: str  # at which Gloo on other nodes connects to this node, "" if the host name does not resolve
    route_address: str  # the address and interface on the route to rank 0, "" if unknown
    interface: str
    socket_ifname: str  # GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, depending on the backend
    host: str = field(default_factory=socket.gethostname)
    visible_gpus: int = field(default_factory=torch.cuda.device_count)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))  # CPU cores that this process may use
    open_files: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    shm_bytes: int = field(
        default_factory=lambda: shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    )

    @property
    def is_loopback(self) -> bool:
        """True if only this node can reach ``address``; Debian's /etc/hosts maps the host name to 127.0.1.1."""
        return self.address.startswith("127.") or self.address == "::1"


def collect_rank_info(
    config: Config, env: DistributedEnvironment, choice: DeviceChoice, environ: Mapping[str, str] = os.environ
) -> RankInfo:
    """Observe this rank, whose device is ``choice``."""
    error, backend, precision, device, threads = choice.error, "gloo", "fp32", torch.device(choice.device), 1
    try:
        backend = resolve_backend(config.distributed.backend, device)
        precision = resolve_precision(config.precision, device, choice.bf16)
        threads = config.distributed.threads or threads_from_environ(environ) or 1
    except UserError as user_error:
        error = error or str(user_error)
    socket_ifname = environ.get("NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME", "")
    route_address, interface = route_to(env.master_addr)
    settings = json.dumps(result_settings(config.to_dict()), sort_keys=True)
    return RankInfo(
        rank=env.rank,
        node_rank=env.node_rank,
        local_rank=env.local_rank,
        local_world_size=env.local_world_size,
        versions=versions(backend),
        settings=hashlib.sha256(settings.encode()).hexdigest()[:12],
        device=str(device),
        device_error=error,
        device_warning=choice.warning,
        backend=backend,
        precision=precision,
        threads=threads,
        address=own_address("" if backend == "nccl" else socket_ifname),
        route_address=route_address,
        interface=interface,
        socket_ifname=socket_ifname,
    )


def versions(backend: str) -> dict[str, str]:
    """Return the versions that must match on all ranks."""
    result = {"distlenet": __version__, "Python": platform.python_version(), "torch": str(torch.__version__)}
    if backend == "nccl":
        result["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return result


def own_address(interface: str) -> str:
    """Return the address that Gloo publishes: that of ``interface``, if given, or of the host name. "" if none."""
    if interface:
        addresses = psutil.net_if_addrs().get(interface, [])
        return next((a.address for a in addresses if a.family == socket.AF_INET), "")
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def route_to(host: str) -> tuple[str, str]:
    """Return this node's address and network interface on the route to ``host``, or "" if unknown."""
    try:
        family, _, _, _, destination = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(destination)  # with UDP this chooses a route and sends nothing
            source = str(probe.getsockname()[0])
    except OSError:
        return "", ""
    interfaces = psutil.net_if_addrs().items()
    return source, next((name for name, addresses in interfaces if any(a.address == source for a in addresses)), "")
