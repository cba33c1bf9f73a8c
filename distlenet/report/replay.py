"""Send the records of a finished run to W&B."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distlenet.config.loading import load_config
from distlenet.report.runs import read_run
from distlenet.tracking.sender import make_sinks, read_json, send
from distlenet.tracking.wandb import Wandb, wandb_mode
from distlenet.utils.errors import UserError


def replay(directory: Path) -> None:
    """Send the records that W&B does not have to the run's W&B run.

    Raise UserError if sending fails or a job is writing in the run directory.
    """
    run = read_run(directory)
    run_ids = [start["run_id"] for start in run.starts if start.get("run_id")]
    if not run_ids:
        raise UserError(f"{directory}: starts.jsonl has no run_id, which identifies the W&B run; give another run")
    config: dict[str, Any] = load_config([str(directory / "config.yaml")]).to_dict()
    mode = wandb_mode("auto" if config["wandb"]["mode"] == "disabled" else config["wandb"]["mode"], os.environ)
    if mode == "disabled":
        raise UserError("WANDB_MODE=disabled: W&B is disabled; unset WANDB_MODE")
    run_info = {"run_id": run_ids[-1], "complete": True}
    start = {"run_info": run_info, "config": config, "sinks": ["wandb"], "wandb_mode": mode}
    with ExitStack() as locks:
        for name in (".lock", ".sidecar.lock"):
            try:
                locks.enter_context(FileLock(directory / name, timeout=0))
            except Timeout as error:
                raise UserError(f"{directory}: a running job writes and sends this run; wait until it ends") from error
            except OSError as error:
                raise UserError(f"{directory / name}: cannot be locked: {error.strerror}; make it writable") from error
        outcome = "finished" if read_json(directory / "summary.json") else "failed"
        sinks = make_sinks(directory, start)
        send(directory, sinks, iter([outcome]))
    sink = sinks.get("wandb")
    if not isinstance(sink, Wandb) or (mode == "online" and not sink.online):
        raise UserError(f"{directory}: not sent, see above; fix the cause and run the same command again")
    result = "the missing ones were sent" if sink.online else "stored offline; wandb sync sends them"
    print(f"{directory}: {len(run.records)} records; {result}")
