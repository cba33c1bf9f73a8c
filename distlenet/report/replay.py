"""Send the records of a finished run to W&B again."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distlenet.config.loading import load_config
from distlenet.utils.errors import UserError


def replay(folder: Path) -> None:
    """Send a run's records to its run on W&B, where they are not there yet.

    Raises UserError where they did not get there, or a job is writing in the folder.
    """
    from distlenet.report.runs import read_run
    from distlenet.tracking.sender import make_sinks, read_json, send
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
    run_info = {"run_id": ids[-1], "complete": True}
    start = {"run_info": run_info, "config": config, "sinks": ["wandb"], "wandb_mode": mode}
    with ExitStack() as locks:
        for name in (".lock", ".sidecar.lock"):
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
