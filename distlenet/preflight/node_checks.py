"""Checks on the first rank of each node: ports, the run directory and the data set."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

from torch.distributed.distributed_c10d import Store

from distlenet.config.loading import runs_directory
from distlenet.config.names import is_import_name
from distlenet.config.schema import Config, DataConfig
from distlenet.data.sources import load_data, open_data, require_local_data
from distlenet.preflight.finding import Finding, pluralize
from distlenet.preflight.ports import peers_of, try_peers
from distlenet.preflight.rank_info import RankInfo
from distlenet.preflight.rules import shorten
from distlenet.storage.objects import Objects
from distlenet.tasks.registry import reads_images
from distlenet.utils.errors import UserError
from distlenet.utils.urls import is_url

TOKEN_TIMEOUT_S = 5.0
"""Time for a file written on one node to appear on the others; NFS caches directory listings for several seconds."""


@dataclass(frozen=True)
class NodeReport:
    """The results of one node, in plain values. An empty error means success."""

    host: str
    unreachable: list[str]
    run_dir_error: str
    data_source: str | None  # None if the task does not use data.name
    data_error: str


def check_node(config: Config, info: RankInfo, num_nodes: int, store: Store, token: str) -> NodeReport:
    """Check this node and its connections to the other nodes."""
    source: str | None = None
    error = ""
    try:
        if reads_images(config):
            source = check_images(config.data)
    except UserError as user_error:
        error = str(user_error)
    unreachable = try_peers(store, peers_of(info.node_rank, num_nodes))
    separate = is_url(config.run.dir)  # each node has a copy
    run_dir_error = check_run_dir(runs_directory(config), "" if separate else token, separate or info.node_rank == 0)
    return NodeReport(info.host, unreachable, run_dir_error, source, error)


def check_images(config: DataConfig) -> str:
    """Return the origin of the images. Raise UserError if they are not here: preflight downloads nothing."""
    config = replace(config, cache="off")  # writes nothing
    if is_import_name(config.name):
        return load_data(config).source
    require_local_data(config)
    with open_data(config) as data:
        return data.source


def check_run_dir(run_dir: Path, token: str, create: bool) -> str:
    """Wait for rank 0's file ``token`` in the run directory, then write there. Return the error, or ""."""
    path = os.path.join(run_dir, token)
    deadline = time.monotonic() + TOKEN_TIMEOUT_S
    try:
        if create:
            os.makedirs(run_dir, exist_ok=True)
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.1)
        TemporaryFile(dir=run_dir).close()
    except OSError as error:
        return f"{run_dir} cannot be written: {error.strerror or error}"
    return "" if os.path.exists(path) else f"{run_dir} does not contain the file that rank 0 wrote"


def check_object_store(url: str) -> Finding:
    """Write, list, read and remove an object."""
    name = f".preflight/{secrets.token_hex(8)}"
    try:
        objects = Objects(url)
        objects.write(name, b"distlenet")
        missing = name not in objects.list(".preflight") or objects.read(name) != b"distlenet"
        objects.remove(name)
    except UserError as error:
        return Finding("object store", "FAIL", str(error), "training would fail in the same way")
    if missing:
        return Finding("object store", "FAIL", f"{url} does not return what was written", "give another run.dir")
    return Finding("object store", "ok", f"{url} can be written and read")


@contextmanager
def remove_if_created(run_dir: Path) -> Iterator[None]:
    """After the block, remove ``run_dir`` and its parents if the block created them and they are empty."""
    missing = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def apply_node_rules(nodes: Sequence[NodeReport], config: Config) -> list[Finding]:
    """Turn the reports of all nodes into findings on ports (of several nodes), run directory and images."""

    def finding(name: str, faults: list[str], hint: str, success: str) -> Finding:
        return Finding(name, "FAIL", shorten(faults, "; "), hint) if faults else Finding(name, "ok", success)

    ports = finding(
        "ports",
        [f"{node.host} cannot reach {peer}" for node in nodes for peer in node.unreachable],
        "allow TCP connections between nodes on all ports above 1023; ranks choose their ports freely",
        f"open between {len(nodes)} nodes",
    )
    run_dir = finding(
        "run directory",
        [f"{node.host}: {node.run_dir_error}" for node in nodes if node.run_dir_error],
        "give a run.dir on a disk that all nodes share, or fix its permissions",
        f"{runs_directory(config)} is writable on {pluralize(len(nodes), 'node')}",
    )
    if not any(node.data_error or node.data_source is not None for node in nodes):
        return [ports, run_dir] if len(nodes) > 1 else [run_dir]  # the trial step reports the task's own data
    data = finding(
        "data",
        [f"{node.host}: {node.data_error}" for node in nodes if node.data_error],
        "fix this on that node, or give another data.root",
        f"{config.data.name}, verified, in {nodes[0].data_source}",
    )
    return [ports, run_dir, data] if len(nodes) > 1 else [run_dir, data]
