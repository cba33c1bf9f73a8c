"""Check that all nodes of a job see the same run directory."""

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distlenet.distributed.collectives import broadcast_object, gather_on_rank_0, hosts_of_ranks
from distlenet.utils.errors import warn

APPEARS_S = 5.0  # time for a file to appear on other nodes; NFS caches listings for several seconds


def hosts_without(directory: Path, rank: int, hosts: Sequence[str]) -> list[str]:
    """Return, on rank 0, which ``hosts`` of the ranks do not see rank 0's ``directory``. A collective."""
    if len(set(hosts)) == 1:
        return []
    token = directory / broadcast_object(f".shared-{secrets.token_hex(8)}")  # collective
    if rank == 0:
        with suppress(OSError):
            token.touch()
    broadcast_object(None)  # collective: the file exists
    deadline = time.monotonic() + APPEARS_S
    while not (visible := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = gather_on_rank_0(visible)  # collective
    if rank != 0:
        return []
    with suppress(OSError):
        os.unlink(token)
    return sorted({host for host, sees_it in zip(hosts, found, strict=True) if not sees_it})


def warn_if_not_shared(directory: Path, rank: int) -> None:
    """Warn, on rank 0, if a node does not see its run directory: a restart may lose the checkpoints. A collective."""
    if hosts := hosts_without(directory, rank, hosts_of_ranks()):
        warn(
            f"run directory {directory}: is not shared with {', '.join(hosts[:8])}; only the node of rank 0 has the "
            "checkpoints, and if another node becomes rank 0, the run starts from scratch; give a run.dir on a shared "
            "disk or in an object store (run.dir=s3://BUCKET/PREFIX)"
        )
