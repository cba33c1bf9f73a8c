"""What ranks tell each other through their store before there is a process group, and what that means."""

import json
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.config.schema import Config
from distlenet.data.transforms import SIZE
from distlenet.distributed.address import first_host
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.rendezvous import format_ranks
from distlenet.preflight import rank_info as facts
from distlenet.preflight import rules as judge
from distlenet.preflight import run_dir as folder
from distlenet.preflight.finding import Finding
from distlenet.preflight.ports import Listener, peers_of, try_peers
from distlenet.preflight.rank_info import Facts
from distlenet.utils.errors import RankError


def look(config: Config, env: DistributedEnvironment, here: Store, wait_s: float) -> list[Finding]:
    """Look at what each rank sees, and at what lies between nodes, without a process group.

    Every rank tells rank 0 through the store, which judges. Returns findings on rank 0, elsewhere none.
    """
    mine = facts.look(config, env)
    here.set(f"facts/{env.rank}", mine.to_json())
    leader = env.local_rank == 0
    listener = None
    if leader:
        listener = listen(here, env, mine)
    if env.rank == 0:
        wait_for(here, [f"facts/{rank}" for rank in range(env.world_size)], wait_s)
        word = secrets.token_hex(4)
        written = folder.write_token(config, word, 0)
        here.set("word", word)
    wait_for(here, ["word"], 2 * wait_s)
    clock = facts.now()  # all at once, but for the time of a message
    word = here.get("word").decode()
    if env.rank != 0:
        written = folder.write_token(config, word, env.node_rank) if leader else ""
    report: dict[str, Any] = {"clock": clock}
    if leader:
        nodes = node_count(here, env)
        report["written"] = written
        report["sees"] = bool(written) or folder.sees_token(config, word, 0)
        report["peers"] = try_peers(here, peers_of(env.node_rank, nodes), wait_s)
        report["data"], report["no data"] = folder.data_here(config)
    here.set(f"report/{env.rank}", json.dumps(report))
    findings = []
    if env.rank == 0:
        keys = [f"report/{rank}" for rank in range(env.world_size)]
        wait_for(here, keys, 3 * wait_s)
        reports = [json.loads(here.get(key)) for key in keys]
        everyones = [Facts.from_json(here.get(f"facts/{rank}")) for rank in range(env.world_size)]
        batch_bytes = -(-config.train.global_batch_size // env.world_size) * SIZE * SIZE
        clocks = [report["clock"] - reports[0]["clock"] for report in reports]
        findings = judge.judge(everyones, clocks, config, batch_bytes)
        findings += between(everyones, reports, config)
    folder_done(here, env, config, word, leader, wait_s)
    if listener is not None:
        listener.close()
    return findings


def wait_for(here: Store, keys: list[str], wait_s: float) -> None:
    """Wait for keys of the store. Raises RankError."""
    try:
        here.wait(keys, timedelta(seconds=wait_s))
    except dist.DistStoreError as error:
        late = [key for key in keys if not here.check([key])]
        missing = sorted({int(key.rpartition("/")[2]) if "/" in key else 0 for key in late})  # rank 0 says the word
        raise RankError(
            f"{format_ranks(missing)} did not answer within {wait_s:g} s (--wait); look at what they print"
        ) from error


def listen(here: Store, env: DistributedEnvironment, mine: Facts) -> Listener | None:
    """Listen for other nodes, and say where."""
    host = socket.gethostname()
    address = "" if mine.loopback else mine.address
    if not address:
        address = facts.route_address(first_host(env)) or "127.0.0.1"
    try:
        listener = Listener(address, word := secrets.token_hex(8))
    except OSError as error:
        here.set(f"listen/{env.node_rank}", f"{host} - - {error.strerror or error}")
        return None
    here.set(f"listen/{env.node_rank}", f"{host} {address} {listener.port} {word}")
    return listener


def node_count(here: Store, env: DistributedEnvironment) -> int:
    """Return how many nodes there are: one more than the last rank's."""
    return Facts.from_json(here.get(f"facts/{env.world_size - 1}")).node_rank + 1


def folder_done(
    here: Store, env: DistributedEnvironment, config: Config, word: str, leader: bool, wait_s: float
) -> None:
    """Remove the files that tried the run folder: rank 0's last, since it takes the folder away, too."""
    if leader and env.rank != 0:
        folder.remove_token(config, word, env.node_rank)
    here.add("removed", 1)
    if env.rank == 0:
        deadline = time.monotonic() + wait_s
        while here.add("removed", 0) < env.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
        folder.remove_token(config, word, 0)


def between(everyones: list[Facts], reports: list[dict[str, Any]], config: Config) -> list[Finding]:
    """Judge what leaders tried: ports, run folder, data."""
    nodes = [(f.host, report) for f, report in zip(everyones, reports, strict=True) if f.local_rank == 0]
    findings = []
    closed = [f"{host} cannot reach {peer}" for host, report in nodes for peer in report["peers"]]
    if len(nodes) > 1:
        text = "; ".join(closed[:4]) + (f"; and {len(closed) - 4} more" if len(closed) > 4 else "")
        mend = "let nodes open TCP connections to each other on all ports above 1023: ranks choose theirs freely"
        findings.append(
            Finding("ports", "FAIL", text, mend)
            if closed
            else Finding("ports", "ok", f"open between {len(nodes)} nodes")
        )
    unwritten = [f"{report['written']} on {host}" for host, report in nodes if report["written"]]
    unseen = [host for host, report in nodes if not report["sees"]]
    if unwritten:
        findings.append(Finding("run folder", "FAIL", unwritten[0], "give another run.dir, or mend its rights"))
    elif unseen:
        text = f"{config.run.dir} on {', '.join(unseen[:4])} is not the folder of {nodes[0][0]}"
        findings.append(Finding("run folder", "FAIL", text, "give a run.dir on a disk that all nodes share"))
    else:
        findings.append(
            Finding("run folder", "ok", f"{config.run.dir} is writable on {judge.count(len(nodes), 'node')}")
        )
    if not unwritten:
        findings.append(_room(config))
    lacking = [f"{host}: {report['no data']}" for host, report in nodes if report["no data"]]
    if lacking:
        findings.append(Finding("data", "FAIL", "; ".join(lacking[:4]), "do so there, or give another data.root"))
    else:
        findings.append(Finding("data", "ok", f"{config.data.name}, verified, in {nodes[0][1]['data']}"))
    return findings


def _room(config: Config) -> Finding:
    try:
        short = folder.room(config)
    except OSError as error:
        short = f"{config.run.dir}: {error.strerror or error}"
    if short:
        return Finding("room", "FAIL", short, "make room, give another run.dir, or a smaller checkpoint.keep_last")
    return Finding("room", "ok", f"for the {config.checkpoint.keep_last} newest checkpoints and the best")
