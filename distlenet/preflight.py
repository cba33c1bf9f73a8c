"""``python -m distlenet.preflight``, alone or under torchrun or srun: would a job start here? One table says."""

from distlenet.orphan import die_with_agent

if __name__ == "__main__":
    die_with_agent()  # before the imports that take seconds

import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.checks import Finding
from distlenet.checks.judge import count
from distlenet.checks.nodes import look
from distlenet.config import load_config
from distlenet.entry import run_entry, settings_parser, speaks_for_others, whole_number
from distlenet.errors import RankError, UserError
from distlenet.rehearsal import Checkup, together
from distlenet.rendezvous import meet_all
from distlenet.world import World, world_from_environ


def main() -> None:
    """Look, print, and end with status 0 where a job would start. Raises UserError where it would not."""
    parser = settings_parser("distlenet.preflight", "Check, in seconds, what a job with these settings will need.")
    parser.add_argument("--allreduce", action="store_true", help="time all-reduces of all sizes, and pairs of nodes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--wait", metavar="S", type=whole_number, default=60, help="seconds to wait for ranks (60)")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    world = World()
    try:
        world = world_from_environ(os.environ)
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if arguments.json and speaks_for_others(error):
            show(Checkup([Finding("settings", "FAIL", str(error))]), world, True, started)
        raise
    try:
        here = meet_all(world, arguments.wait, "--wait")
        checkup = Checkup(look(config, world, here, arguments.wait))
    except RankError as error:
        host = socket.gethostname()
        finding = Finding("ranks", "FAIL", str(error) if host in str(error) else f"on {host}: {error}")
        if world.local_rank == 0:
            show(Checkup([finding]), world, arguments.json, started)
        raise RankError("preflight: the ranks cannot meet; see the table") from error
    if from_store(here, world, "go on", checkup.good, arguments.wait):
        try:
            together(checkup, config, here, arguments.allreduce)
        except (UserError, RuntimeError, dist.DistError, OSError) as error:
            text = " ".join(str(error).split())[:300]
            checkup.findings.append(Finding("training", "FAIL", text, "mend that: training would end so, too"))
    if world.rank == 0:
        show(checkup, world, arguments.json, started)
    if not from_store(here, world, "good", checkup.good, arguments.wait):
        failed = sum(finding.status == "FAIL" for finding in checkup.findings)
        raise UserError(f"preflight: {failed} of {len(checkup.findings)} checks failed; see the table")


def from_store(here: Store, world: World, key: str, value: bool, wait_s: float) -> bool:
    """Return rank 0's ``value`` on every rank, by the store alone."""
    if world.rank == 0:
        here.set(key, json.dumps(value))
    here.wait([key], timedelta(seconds=10 * wait_s))
    answer = bool(json.loads(here.get(key)))
    here.add(f"{key} heard", 1)
    if world.rank == 0:  # who may hold the store: leaves when all have heard
        deadline = time.monotonic() + wait_s
        while here.add(f"{key} heard", 0) < world.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
    return answer


def show(checkup: Checkup, world: World, as_json: bool, started: float) -> None:
    """Print the table: colours on a terminal, plain lines elsewhere, or JSON."""
    seconds = time.monotonic() - started
    if as_json:
        report: dict[str, Any] = {"good": checkup.good, "world_size": world.world_size, "seconds": round(seconds, 3)}
        report["checks"] = [finding.to_dict() for finding in checkup.findings]
        report["all_reduce"] = checkup.timing and checkup.timing.to_dict()
        report["slow_pairs"] = checkup.slow_pairs
        print(json.dumps(report), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "FAIL": "bold red"}
    if sys.stdout.isatty():
        table = Table("", "check", "found", box=None, pad_edge=False)
        for finding in checkup.findings:
            found = Text(finding.found)
            if finding.mend:
                found.append(f"\n→ {finding.mend}", style=colours[finding.status])
            table.add_row(Text(finding.status, style=colours[finding.status]), finding.name, found)
        Console().print(table)
    else:
        for finding in checkup.findings:
            print(f"{finding.status:5} {finding.name:15} {finding.found}" + f"; {finding.mend}" * bool(finding.mend))
    outcome = "a job would start" if checkup.good else "a job would not start"
    print(f"{count(world.world_size, 'rank')} looked at in {seconds:.1f} s: {outcome}", flush=True)


if __name__ == "__main__":
    run_entry(main)
