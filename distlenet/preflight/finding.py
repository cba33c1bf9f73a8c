"""The result of one check, and the report that collects and prints all results."""

import json
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from distlenet.preflight.allreduce import Timing

STYLES = {"ok": "green", "note": "yellow", "FAIL": "bold red"}


class Finding(NamedTuple):
    """One line of the table: the check, its status, what was found, and how to fix a failure."""

    name: str
    status: Literal["ok", "note", "FAIL"]  # a note does not stop a job
    found: str
    hint: str = ""


@dataclass
class PreflightReport:
    """All findings, and with ``--allreduce`` the measurements."""

    findings: list[Finding]
    timing: Timing | None = None
    slow_pairs: list[tuple[str, str, float]] | None = None  # two hosts and their time relative to the median

    @property
    def failures(self) -> int:
        """The number of failed checks."""
        return sum(finding.status == "FAIL" for finding in self.findings)

    def print(self, world_size: int, seconds: float, as_json: bool) -> None:
        """Print one line per finding, in colour on a terminal, and the outcome; or all of it as JSON."""
        if as_json:
            report = {"good": not self.failures, "world_size": world_size, "seconds": round(seconds, 3)}
            checks, timing = [finding._asdict() for finding in self.findings], self.timing and asdict(self.timing)
            print(json.dumps({**report, "checks": checks, "all_reduce": timing, "slow_pairs": self.slow_pairs}))
            return
        console = Console(highlight=False, soft_wrap=True)
        for finding in self.findings:
            hint = f"; {finding.hint}" if finding.hint else ""
            status = (f"{finding.status:5}", STYLES[finding.status])
            console.print(Text.assemble(status, f" {finding.name:15} {finding.found}{hint}"))
        outcome = "a job would not start" if self.failures else "a job would start"
        console.print(f"{pluralize(world_size, 'rank')} checked in {seconds:.1f} s: {outcome}")


def pluralize(number: int, noun: str) -> str:
    """Format ``1 rank`` or ``2 ranks``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
