"""``python -m distlenet.preflight``, alone or under torchrun or srun: would a job start here? One table says."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.config.arguments import positive_int, settings_parser
from distlenet.config.loading import load_config
from distlenet.distributed.entry_point import run_entry, should_report
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.distributed.rendezvous import rendezvous
from distlenet.preflight.exchange import look
from distlenet.preflight.finding import Finding
from distlenet.preflight.rules import count
from distlenet.preflight.trial_step import PreflightReport, together
from distlenet.utils.errors import RankError, UserError


def main() -> None:
    """Look, print, and end with status 0 where a job would start. Raises UserError where it would not."""
    parser = settings_parser("distlenet.preflight", "Check, in seconds, what a job with these settings will need.")
    parser.add_argument("--allreduce", action="store_true", help="time all-reduces of all sizes, and pairs of nodes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--wait", metavar="S", type=positive_int, default=60, help="seconds to wait for ranks (60)")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    env = DistributedEnvironment()
    try:
        env = read_environment(os.environ)
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if arguments.json and should_report(error):
            show(PreflightReport([Finding("settings", "FAIL", str(error))]), env, True, started)
        raise
    try:
        here = rendezvous(env, arguments.wait, "--wait")
        checkup = PreflightReport(look(config, env, here, arguments.wait))
    except RankError as error:
        host = socket.gethostname()
        finding = Finding("ranks", "FAIL", str(error) if host in str(error) else f"on {host}: {error}")
        if env.local_rank == 0:
            show(PreflightReport([finding]), env, arguments.json, started)
        raise RankError("preflight: the ranks cannot meet; see the table") from error
    if from_store(here, env, "go on", checkup.good, arguments.wait):
        try:
            together(checkup, config, here, arguments.allreduce)
        except (UserError, RuntimeError, dist.DistError, OSError) as error:
            text = " ".join(str(error).split())[:300]
            checkup.findings.append(Finding("training", "FAIL", text, "mend that: training would end so, too"))
    if env.rank == 0:
        show(checkup, env, arguments.json, started)
    if not from_store(here, env, "good", checkup.good, arguments.wait):
        failed = sum(finding.status == "FAIL" for finding in checkup.findings)
        raise UserError(f"preflight: {failed} of {len(checkup.findings)} checks failed; see the table")


def from_store(here: Store, env: DistributedEnvironment, key: str, value: bool, wait_s: float) -> bool:
    """Return rank 0's ``value`` on every rank, by the store alone."""
    if env.rank == 0:
        here.set(key, json.dumps(value))
    here.wait([key], timedelta(seconds=10 * wait_s))
    answer = bool(json.loads(here.get(key)))
    here.add(f"{key} heard", 1)
    if env.rank == 0:  # who may hold the store: leaves when all have heard
        deadline = time.monotonic() + wait_s
        while here.add(f"{key} heard", 0) < env.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
    return answer


def show(checkup: PreflightReport, env: DistributedEnvironment, as_json: bool, started: float) -> None:
    """Print the table: colours on a terminal, plain lines elsewhere, or JSON."""
    seconds = time.monotonic() - started
    if as_json:
        report: dict[str, Any] = {"good": checkup.good, "world_size": env.world_size, "seconds": round(seconds, 3)}
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
    print(f"{count(env.world_size, 'rank')} looked at in {seconds:.1f} s: {outcome}", flush=True)


if __name__ == "__main__":
    run_entry(main)
