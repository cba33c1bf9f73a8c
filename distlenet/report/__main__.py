"""``python -m distlenet.report RUN...``: one page with a run's curves, or those of several side by side."""

import argparse
from pathlib import Path

from distlenet.config.arguments import Parser
from distlenet.distributed.entry_point import run_entry
from distlenet.report.replay import replay
from distlenet.utils.errors import UserError


def main() -> None:
    """Write the report, or send a run's records to W&B again."""
    parser = Parser(
        "python -m distlenet.report",
        description="Write a page that needs no network: RUN/report.html, with PNGs in RUN/report/; or, of several "
        "runs, ./report.html. It can be made at any time, also of a run under way.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    parser.add_argument("--output", metavar="FILE.html", type=Path, help="the page to write")
    parser.add_argument(
        "--replay-wandb", action="store_true", help="send W&B what it does not have of the runs' records, instead"
    )
    arguments = parser.parse_args()
    if arguments.replay_wandb:
        for folder in arguments.runs:
            replay(folder)
        return
    from distlenet.report.page import write_report  # matplotlib: not for a replay
    from distlenet.report.runs import read_run

    runs = [read_run(folder) for folder in arguments.runs]
    page = arguments.output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    if page.suffix != ".html":
        raise UserError(f"--output {page}: expected a name that ends in .html")
    write_report(runs, page)
    print(f"Report: {page}")


if __name__ == "__main__":
    run_entry(main)
