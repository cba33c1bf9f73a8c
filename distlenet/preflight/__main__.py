"""``python -m distlenet.preflight``, started as the job would be: check in seconds whether it would start."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

import os
import socket
import time
from contextlib import nullcontext, suppress

from distlenet.config.arguments import settings_parser
from distlenet.config.loading import load_config, runs_directory
from distlenet.config.schema import Config
from distlenet.distributed.entry_point import run_entry, should_report
from distlenet.distributed.environment import DistributedEnvironment, read_environment
from distlenet.distributed.rendezvous import rendezvous
from distlenet.preflight.exchange import Exchange, run_node_checks
from distlenet.preflight.finding import Finding, PreflightReport
from distlenet.preflight.node_checks import remove_if_created
from distlenet.preflight.trial_step import run_collective_checks
from distlenet.utils.errors import RankError, UserError, one_line
from distlenet.utils.parser import positive_int


def main() -> None:
    """Run all checks and print the table. Raise UserError if a job would not start."""
    parser = settings_parser("distlenet.preflight", "Check, in seconds, whether a job with these settings would start.")
    parser.add_argument("--allreduce", action="store_true", help="time all-reduces of all sizes, and pairs of nodes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--wait", metavar="S", type=positive_int, default=60, help="seconds to wait for ranks (60)")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    env = DistributedEnvironment()

    def show(report: PreflightReport) -> None:
        report.print(env.world_size, time.monotonic() - started, arguments.json)

    try:
        env = read_environment(os.environ)
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
        if arguments.json and should_report(error):
            show(PreflightReport([Finding("settings", "FAIL", str(error))]))
        raise
    try:
        report = run_checks(config, env, arguments.wait, arguments.allreduce)
    except RankError as error:
        if env.local_rank == 0:
            show(PreflightReport([Finding("ranks", "FAIL", f"on {socket.gethostname()}: {error}")]))
        raise RankError("preflight: the ranks cannot communicate; see the table") from error
    if env.rank == 0:
        show(report)
    if report.failures:
        raise UserError(f"preflight: {report.failures} of {len(report.findings)} checks failed; see the table")


def run_checks(config: Config, env: DistributedEnvironment, wait_s: float, all_sizes: bool) -> PreflightReport:
    """Return rank 0's findings on every rank. Raise RankError if the ranks cannot communicate."""
    exchange = Exchange(rendezvous(env, wait_s, "--wait"), env, wait_s)
    with remove_if_created(runs_directory(config)) if env.rank == 0 else nullcontext():
        report = PreflightReport(run_node_checks(config, exchange))
        if not report.failures:
            try:
                run_collective_checks(report, config, exchange.store, all_sizes)
            except (UserError, RuntimeError, OSError) as error:
                text, hint = one_line(error), "fix this: training would fail in the same way"
                report.findings.append(Finding("training", "FAIL", text, hint))
        report.findings = [Finding(*value) for value in exchange.broadcast("all findings", report.findings, 10)]
        with suppress(RankError):
            exchange.gather("end", None)  # rank 0 may hold the store, so it exits last
    return report


if __name__ == "__main__":
    run_entry(main)
