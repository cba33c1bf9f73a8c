"""``python -m distlenet.report RUN...``: write a page with the curves of one run, or compare several runs."""

from distlenet.utils.startup import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c()  # before the imports that take seconds

import argparse
from pathlib import Path

from distlenet.distributed.entry_point import run_entry
from distlenet.report.optional import require_report_packages
from distlenet.report.replay import replay
from distlenet.report.runs import read_run
from distlenet.storage.fetch import fetch_run
from distlenet.utils.errors import UserError
from distlenet.utils.parser import Parser


def main() -> None:
    """Write the report, or send the records of the runs to W&B."""
    parser = Parser(
        "python -m distlenet.report",
        description="Write a self-contained page: RUN/report.html, with PNG files in RUN/report/; for several runs, "
        "./report.html. The run may still be training.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run directory, or its URL")
    parser.add_argument("--output", metavar="FILE.html", type=Path, help="the page to write")
    parser.add_argument(
        "--replay-wandb", action="store_true", help="write no page; send the records that W&B does not have"
    )
    arguments = parser.parse_args()
    if arguments.replay_wandb:
        for run in arguments.runs:
            replay(fetch_run(run))
        return
    require_report_packages()
    from distlenet.report.page import write_report  # imports matplotlib and jinja2

    runs = [read_run(fetch_run(run)) for run in arguments.runs]
    page = arguments.output or (runs[0].directory / "report.html" if len(runs) == 1 else Path("report.html"))
    if page.suffix != ".html":
        raise UserError(f"--output {page}: expected a name that ends in .html")
    write_report(runs, page)
    print(f"Report: {page}")


if __name__ == "__main__":
    run_entry(main)
