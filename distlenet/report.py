"""``python -m distlenet.report RUN...``: one page with a run's curves, or those of several side by side."""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distlenet.config import load_config
from distlenet.entry import Parser, run_entry
from distlenet.errors import UserError


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
    from distlenet.reporting.page import write_report  # matplotlib: not for a replay
    from distlenet.reporting.runs import read_run

    runs = [read_run(folder) for folder in arguments.runs]
    page = arguments.output or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    if page.suffix != ".html":
        raise UserError(f"--output {page}: expected a name that ends in .html")
    write_report(runs, page)
    print(f"Report: {page}")


def replay(folder: Path) -> None:
    """Send a run's records to its run on W&B, where they are not there yet.

    Raises UserError where they did not get there, or a job is writing in the folder.
    """
    from distlenet.mirror import make_sinks, read_json, send
    from distlenet.reporting.runs import read_run
    from distlenet.tracking.wandb import Wandb, wandb_mode

    run = read_run(folder)
    ids = [start["run_id"] for start in run.starts if start.get("run_id")]
    if not ids:
        raise UserError(
            f"{folder}: starts.jsonl names no run_id, by which W&B knows a run; give a run of distlenet.train"
        )
    config: dict[str, Any] = load_config([str(folder / "config.yaml")]).to_dict()
    mode = wandb_mode("auto" if config["wandb"]["mode"] == "disabled" else config["wandb"]["mode"], os.environ)
    if mode == "disabled":
        raise UserError("WANDB_MODE=disabled: nothing can be sent; unset it")
    facts = {"run_id": ids[-1], "complete": True}
    start = {"facts": facts, "config": config, "wanted": ["wandb"], "wandb_mode": mode}
    with ExitStack() as locks:
        for name in (".lock", ".mirror.lock"):
            try:
                locks.enter_context(FileLock(folder / name, timeout=0))
            except Timeout as error:
                raise UserError(f"{folder}: a job is writing there, and sends it itself; wait for its end") from error
        outcome = "finished" if read_json(folder / "summary.json") else "failed"
        took = send(folder, make_sinks(folder, start), iter([outcome]))
    sink = took.get("wandb")
    if not isinstance(sink, Wandb) or (mode == "online" and not sink.online):
        raise UserError(f"{folder}: not sent, see above; mend that and run the same command again")
    where = "those that W&B did not have are sent" if sink.online else "kept for wandb sync, which sends them"
    print(f"{folder}: {len(run.records)} records; {where}")


if __name__ == "__main__":
    run_entry(main)
