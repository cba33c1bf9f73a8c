"""What the first rank of each node checks: ports, the run directory and the data set."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from distlenet.config.schema import Config
from distlenet.data.sources import open_data, require_local_data
from distlenet.preflight.finding import Finding, pluralize
from distlenet.preflight.ports import peers_of, try_peers
from distlenet.preflight.rank_info import RankInfo
from distlenet.preflight.rules import shorten
from distlenet.utils.errors import UserError

TOKEN_TIMEOUT_S = 5.0
"""Time for a file written on one node to appear on the others; NFS caches directory listings for several seconds."""


@dataclass(frozen=True)
class NodeReport:
    """The results of one node, in plain values. An empty error means success."""

    host: str
    unreachable: list[str]
    run_dir_error: str
    run_dir_shared: bool
    data_source: str
    data_error: str


def check_node(config: Config, info: RankInfo, num_nodes: int, store: Store, nonce: str, wait_s: float) -> NodeReport:
    """Check this node and its connections to the other nodes."""
    run_dir_error, shared = write_token(token_path(config, nonce, info.node_rank), token_path(config, nonce, 0))
    unreachable = try_peers(store, peers_of(info.node_rank, num_nodes), wait_s)
    source = error = ""
    try:
        require_local_data(config.data)  # preflight downloads nothing
        with open_data(config.data) as data:
            source = data.source
    except UserError as user_error:
        error = str(user_error)
    return NodeReport(info.host, unreachable, run_dir_error, shared, source, error)


def token_path(config: Config, nonce: str, node_rank: int) -> Path:
    """Return the file by which a node proves that it writes to the same run directory as node 0."""
    return Path(config.run.dir) / f".preflight-{nonce}-{node_rank}"


def write_token(token: Path, token_of_node_0: Path) -> tuple[str, bool]:
    """Write this node's token; return the error, or "", and whether the token of node 0 is visible.

    Only node 0 creates a missing directory, so the other nodes wait for its token first.
    """
    is_node_0 = token == token_of_node_0
    deadline = time.monotonic() + TOKEN_TIMEOUT_S
    while not (shared := is_node_0 or os.path.exists(token_of_node_0)) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        if is_node_0:
            token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(token.name)
    except OSError as error:
        return f"{token.parent} cannot be written: {error.strerror or error}", shared
    return "", shared


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
    """Turn the reports of all nodes into findings."""
    ports = [check_ports(nodes)] if len(nodes) > 1 else []
    return [*ports, check_run_dir(nodes, config.run.dir), check_data(nodes, config.data.name)]


def check_ports(nodes: Sequence[NodeReport]) -> Finding:
    """Check that no connection between nodes failed."""
    if failures := [f"{node.host} cannot reach {peer}" for node in nodes for peer in node.unreachable]:
        hint = "allow TCP connections between nodes on all ports above 1023; ranks choose their ports freely"
        return Finding("ports", "FAIL", shorten(failures, "; "), hint)
    return Finding("ports", "ok", f"open between {len(nodes)} nodes")


def check_run_dir(nodes: Sequence[NodeReport], run_dir: str) -> Finding:
    """Check that all nodes write to one run directory."""
    if errors := [f"{node.run_dir_error} on {node.host}" for node in nodes if node.run_dir_error]:
        return Finding("run directory", "FAIL", errors[0], "give another run.dir, or fix its permissions")
    if separate := [node.host for node in nodes if not node.run_dir_shared]:
        found = f"{run_dir} on {shorten(separate)} is not the directory of {nodes[0].host}"
        return Finding("run directory", "FAIL", found, "give a run.dir on a disk that all nodes share")
    return Finding("run directory", "ok", f"{run_dir} is writable on {pluralize(len(nodes), 'node')}")


def check_data(nodes: Sequence[NodeReport], name: str) -> Finding:
    """Check that every node has the data set, undamaged."""
    if errors := [f"{node.host}: {node.data_error}" for node in nodes if node.data_error]:
        return Finding("data", "FAIL", shorten(errors, "; "), "fix this on that node, or give another data.root")
    return Finding("data", "ok", f"{name}, verified, in {nodes[0].data_source}")
