"""``python -m distlenet.train``, alone or under torchrun or srun: compose a run, train, tear down."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from filelock import FileLock, Timeout

from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import positive_int, settings_parser
from distlenet.config.loading import load_config, run_folder, to_yaml
from distlenet.config.schema import Config
from distlenet.data.sources import load_on_node
from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.distributed.environment import read_environment
from distlenet.distributed.preemption import Preemption, handle_preemption
from distlenet.reduction import micro_batch_size
from distlenet.tracking.base import Record, Trackers
from distlenet.tracking.history import History
from distlenet.tracking.progress_bar import make_console
from distlenet.tracking.sidecar import Sidecar
from distlenet.training.dry_run import plan
from distlenet.training.starts import is_restart, process_age_s
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError, warn

REPORT_S = 120.0
"""Seconds that a report may take."""

MOST_RANKS = 1_000_000
"""For how many ranks a dry run plans."""


def main() -> None:
    """Train as the arguments say, or tell what training would do."""
    parser = settings_parser("distlenet.train", "Train the network, on this process's share of the data.")
    parser.add_argument("--dry-run", action="store_true", help="compose and check everything, print the plan, and end")
    parser.add_argument(
        "--world-size", metavar="N", type=positive_int, help="ranks of the job that --dry-run plans (1)"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        dry_run(config, arguments.world_size or 1)
        return
    if arguments.world_size is not None:
        raise UserError("--world-size: is for --dry-run; how many ranks train, torchrun or srun says")
    summary = train(config)
    if summary["rank"] == 0 and wants_report(config.run.report, summary):
        report(summary["folder"])


def dry_run(config: Config, world_size: int) -> None:
    """Print what a job of ``world_size`` ranks would do. Raises UserError as that job would."""
    if world_size > MOST_RANKS:
        raise UserError(f"--world-size {world_size}: expected at most {MOST_RANKS:,}")
    if read_environment(os.environ).world_size > 1:
        raise UserError("--dry-run composes the whole job in one process: start it alone, and give --world-size")
    for name, text in plan(config, world_size):
        print(f"{name:18} {text}")


def wants_report(wanted: str, summary: Record) -> bool:
    """Resolve ``run.report``."""
    return wanted == "always" or (wanted == "auto" and (sys.stdout.isatty() or summary["wall_s"] >= 60))


def report(folder: str) -> None:
    """Write a run's report, as ``python -m distlenet.report`` does. The training is done: what fails is but told."""
    command = [sys.executable, "-m", "distlenet.report", folder]
    try:
        subprocess.run(command, check=True, timeout=REPORT_S)
    except (OSError, subprocess.SubprocessError) as error:
        warn(f"no report: {error}; python -m distlenet.report {folder} writes it")


def train(config: Config) -> Record:
    """Train one run as one rank, and return its summary.

    Raises UserError for everything that the user can mend, where possible before the ranks meet.
    """
    if config.checkpoint.path is not None:
        raise UserError(
            f"checkpoint.path={config.checkpoint.path}: is for distlenet.evaluate; to go on from a file give "
            "checkpoint.resume"
        )
    folder = run_folder(config)
    preemption_grace_s = config.checkpoint.preemption_grace_s
    with (
        handle_preemption(preemption_grace_s) as preemption,
        closing(make_sidecar(config, folder, preemption)) as sidecar,
        init_distributed(config, folder) as context,
    ):
        rank_0 = context.env.rank == 0
        micro_batch_size(config, context.env.world_size)  # before the data: it is what users get wrong most
        with raise_on_all_ranks():
            if rank_0 and config.checkpoint.resume not in ("auto", "never"):
                find_checkpoint(Path(config.checkpoint.resume))
        # What a lost node still holds it lets go of in a while; a person who starts a second job is told at once.
        lock = FileLock(folder / ".lock", timeout=config.distributed.init_timeout_s / 2 if is_restart() else 0)
        data = load_on_node(config.data, context.env)
        with raise_on_all_ranks():
            if rank_0:
                claim_folder(folder, lock)
        context.log.open(folder)
        with raise_on_all_ranks():
            tracker = make_trackers(config, folder, sidecar) if rank_0 else Trackers()
        try:
            trainer = Trainer(config, context, data, folder, tracker, preemption)
            try:
                summary = trainer.fit()
            finally:
                trainer.checkpointer.close()
                trainer.take_step.close()
            summary |= {"wall_s": process_age_s(), "folder": str(folder)}
            tracker.finish(summary)
        finally:
            tracker.close()
            lock.release()
    return {**summary, "rank": context.env.rank}


def make_sidecar(config: Config, folder: Path, preemption: Preemption) -> Sidecar:
    """Make what sends a run's history on, to W&B say; on rank 0 it begins to get ready.

    Raises UserError, on every rank, where a package is missing that the settings ask for.
    """
    sidecar = Sidecar(folder, config.to_dict(), lambda: preemption.seconds_left() if preemption.asked else math.inf)
    if read_environment(os.environ).rank == 0:
        sidecar.launch()
    return sidecar


def make_trackers(config: Config, folder: Path, sidecar: Sidecar) -> Trackers:
    """Make what rank 0 tells: the console, the run's history, and then what mirrors that."""
    return Trackers([make_console(config.run.console), History(folder, to_yaml(config)), sidecar])


def claim_folder(folder: Path, lock: FileLock) -> None:
    """Make the run folder and take its lock. Raises UserError where it cannot be written, or another job has it."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"run folder {folder}: another job is writing there; give another run.name, or wait") from error
    except OSError as error:
        raise UserError(
            f"run folder {folder}: cannot be written: {error.strerror or error}; give another run.dir or run.name"
        ) from error


if __name__ == "__main__":
    run_entry(main)
