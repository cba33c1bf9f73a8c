"""What a proof prints."""

from collections.abc import Iterable

from distlenet.prove.causes import CAUSES
from distlenet.prove.checks import Finding
from distlenet.prove.comparison import STAGES


def print_findings(findings: Iterable[Finding]) -> None:
    """Print the results of the direct checks."""
    print("Hooks, called directly:")
    for finding in findings:
        print(f"  {finding.check:52} {f'FAILS: {finding.detail}' if finding.cause else 'holds'}", flush=True)


def print_cause(cause: str, hook: str, where: str) -> None:
    """Print the hook to correct, with the usual cause and how to fix it."""
    usual = CAUSES[cause]
    print(f"\nHook to correct: {hook or usual.hook}")
    print(f"  found:       {where}")
    print(f"  usual cause: {usual.why}")
    print(f"  fix:         {usual.fix}")


def print_table(reference: str, columns: dict[str, dict[str, str]]) -> None:
    """Print the result of each stage, per run."""
    print(f"\nRuns, compared with that on {reference}:")
    width = max(map(len, STAGES))
    keys = {name: f"[{number}]" for number, name in enumerate(columns, 1)}
    for name, key in keys.items():
        print(f"  {key} {name}")
    print(f"  {'':{width}}  " + "  ".join(f"{key:7}" for key in keys.values()))
    for stage in STAGES:
        print(f"  {stage:{width}}  " + "  ".join(f"{column[stage]:7}" for column in columns.values()))
