"""``python -m distlenet.train``, alone or under torchrun, srun or mpirun: compose a run, train, clean up."""

from distlenet.utils.process import environment_outside_job, exit_with_agent
from distlenet.utils.startup import announce_start, exit_on_stop_request

if __name__ == "__main__":  # before the imports that take seconds
    exit_with_agent()
    exit_on_stop_request()
    announce_start()

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path

from filelock import FileLock, Timeout

from distlenet.checkpoint.format import is_intact
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import settings_parser
from distlenet.config.loading import check_modules, load_config, run_directory, run_url, to_yaml
from distlenet.config.schema import Config
from distlenet.config.wandb_variables import with_wandb_variables
from distlenet.distributed.collectives import raise_on_all_ranks
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.distributed.environment import read_environment
from distlenet.distributed.preemption import Preemption
from distlenet.distributed.shared_directory import warn_if_not_shared
from distlenet.reduction.batch_size import micro_batch_size
from distlenet.report.optional import missing_report_package
from distlenet.storage.stored_run import closing_upload, open_run, upload_report
from distlenet.task import Task
from distlenet.tasks.registry import MakeTask, create_task
from distlenet.tasks.registry import make_task as make_configured_task
from distlenet.tracking.base import Record, Trackers
from distlenet.tracking.history import History
from distlenet.tracking.progress_bar import make_console
from distlenet.tracking.sidecar import Sidecar
from distlenet.training.dry_run import plan
from distlenet.training.starts import is_restart, process_age_s
from distlenet.training.trainer import Trainer
from distlenet.utils.callable_module import make_callable
from distlenet.utils.errors import UserError, warn
from distlenet.utils.parser import positive_int

REPORT_TIMEOUT_S = 120.0
"""Seconds that writing a report may take."""

MAX_DRY_RUN_RANKS = 1_000_000

MakeTrainer = Callable[[Config, DistributedContext, Task, Path, Trackers, Preemption], Trainer]


def main(make_task: MakeTask = make_configured_task, trainer_class: MakeTrainer = Trainer) -> None:
    """Train, or print the plan of a dry run."""
    parser = settings_parser("distlenet.train", "Train the network, on this process's share of the data.")
    parser.add_argument("--dry-run", action="store_true", help="compose and check everything, print the plan, and exit")
    parser.add_argument(
        "--world-size", metavar="N", type=positive_int, help="ranks of the job to plan, with --dry-run (1)"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if config.run.report == "always" and (missing := missing_report_package()):
        raise UserError(f"run.report=always: {missing}, or give run.report=never")
    if arguments.dry_run:
        dry_run(config, arguments.world_size or 1, make_task)
        return
    if arguments.world_size is not None:
        raise UserError("--world-size: is for --dry-run; torchrun, srun or mpirun sets how many ranks train")
    summary = train(config, make_task, trainer_class, process_age_s())
    if summary["rank"] == 0 and wants_report(config.run.report, summary):
        written = write_report(summary["run_dir"])
        if written and summary["run_url"] is not None:
            upload_report(summary["run_url"], Path(summary["run_dir"]))


def dry_run(config: Config, world_size: int, make_task: MakeTask = make_configured_task) -> None:
    """Print what a job of ``world_size`` ranks would do. Raise UserError if that job would."""
    if world_size > MAX_DRY_RUN_RANKS:
        raise UserError(f"--world-size {world_size}: expected at most {MAX_DRY_RUN_RANKS:,}")
    if read_environment(os.environ).world_size > 1:
        raise UserError("--dry-run composes the whole job in one process: start it alone, and give --world-size")
    check_modules(config)
    for name, text in plan(config, world_size, make_task):
        print(f"{name:18} {text}")


def train(
    config: Config,
    make_task: MakeTask = make_configured_task,
    trainer_class: MakeTrainer = Trainer,
    elapsed_s: float = 0.0,
) -> Record:
    """Train one run as one rank, and return its summary.

    Its times ``start_s`` and ``wall_s`` include ``elapsed_s``, the seconds before the call. Raise UserError for every
    mistake that the user can fix, if possible before the ranks connect.
    """
    begin_s = time.monotonic() - elapsed_s
    if config.checkpoint.path is not None:
        raise UserError(
            f"checkpoint.path={config.checkpoint.path}: is for distlenet.evaluate; to resume from a file give "
            "checkpoint.resume"
        )
    config = with_wandb_variables(config, os.environ)
    check_modules(config)
    run_dir, url = run_directory(config), run_url(config)
    with ExitStack() as stack:
        preemption = stack.enter_context(closing(Preemption(config.checkpoint.preemption_grace_s)))
        locks = stack.enter_context(ExitStack())  # released after everything is written, the log of this rank, too
        sidecar = stack.enter_context(closing(make_sidecar(config, run_dir, preemption)))
        context = stack.enter_context(init_distributed(config, run_dir))
        check_job(config, context, url)  # before the data: a wrong batch size is frequent
        task, rank_0 = create_task(make_task, config), context.env.rank == 0
        with raise_on_all_ranks():
            if rank_0:
                locks.callback(lock_run_dir(run_dir, config.distributed.init_timeout_s).release)
                if url is not None:
                    locks.enter_context(open_stored_run(url, run_dir, config, preemption))
        context.log.open(run_dir)
        if url is None:
            warn_if_not_shared(run_dir, context.env.rank)  # collective
        with raise_on_all_ranks():
            if rank_0:
                check_prometheus_file(config.tracking.prometheus)
            # In this order: the sidecar's process reads what History has written.
            trackers = [make_console(config.run.console), History(run_dir, to_yaml(config)), sidecar] if rank_0 else []
        tracker = stack.enter_context(closing(Trackers(trackers)))

        def fit() -> Record:  # a function: the trainer must be released before the process group ends
            with closing(trainer_class(config, context, task, run_dir, tracker, preemption)) as trainer:
                return trainer.fit(begin_s)

        summary = fit()
        summary |= {"wall_s": time.monotonic() - begin_s, "run_dir": str(run_dir), "run_url": url}
        tracker.finish(summary)
    return {**summary, "rank": context.env.rank}


def check_job(config: Config, context: DistributedContext, url: str | None) -> None:
    """Raise UserError, on every rank, for settings that do not fit the job's ranks or nodes. A collective."""
    micro_batch_size(config, context.env.world_size)
    if config.data.ledger and url is not None and context.env.local_world_size < context.env.world_size:
        raise UserError(
            "data.ledger=true: several nodes need a run.dir on a shared disk, not in an object store; give such a "
            "run.dir, or data.ledger=false"
        )
    with raise_on_all_ranks():
        if context.env.rank == 0 and config.checkpoint.resume not in ("auto", "never"):
            find_checkpoint(config.checkpoint.resume)


def make_sidecar(config: Config, run_dir: Path, preemption: Preemption) -> Sidecar:
    """Create the sidecar; on rank 0, start its process, whose imports take seconds.

    Raise UserError, on every rank, if a package that the settings require is missing.
    """

    def seconds_left() -> float:
        return preemption.seconds_left() if preemption.stop_requested else math.inf

    sidecar = Sidecar(run_dir, config.to_dict(), seconds_left)
    if read_environment(os.environ).rank == 0:
        sidecar.launch()
    return sidecar


def check_prometheus_file(path: str | None) -> None:
    """Raise UserError if the directory of ``tracking.prometheus`` cannot be written."""
    if path is not None and not os.access(Path(path).absolute().parent, os.W_OK):
        raise UserError(f"tracking.prometheus={path}: its directory does not exist or cannot be written; create it")


def open_stored_run(url: str, run_dir: Path, config: Config, preemption: Preemption) -> AbstractContextManager[None]:
    """Make ``run_dir`` the local copy of the run ``url``; return a context that uploads it. Raise UserError."""
    timeout_s = config.distributed.init_timeout_s / 2
    patience_s = timeout_s if is_restart() else 0.0
    keep_last = config.checkpoint.keep_last
    upload = open_run(url, run_dir, keep_last, is_intact, patience_s, timeout_s, preemption.request)
    return closing_upload(upload, timeout_s, preemption)


def lock_run_dir(run_dir: Path, init_timeout_s: float) -> FileLock:
    """Make the run directory and lock it. Raise UserError if it cannot be written, or another job uses it.

    A restart waits for the lock: a lost node releases it after a while. Otherwise a second job fails at once.
    """
    lock = FileLock(run_dir / ".lock", timeout=init_timeout_s / 2 if is_restart() else 0)
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"run directory {run_dir}: another job is writing there; give another run.name, or wait"
        ) from error
    except OSError as error:
        raise UserError(
            f"run directory {run_dir}: cannot be written: {error.strerror or error}; give another run.dir or run.name"
        ) from error
    return lock


def wants_report(wanted: str, summary: Record) -> bool:
    """Resolve ``run.report``."""
    return wanted == "always" or (wanted == "auto" and (sys.stdout.isatty() or summary["wall_s"] >= 60))


def write_report(run_dir: str) -> bool:
    """Run ``python -m distlenet.report``; return its success. The training is complete: a failure only warns."""
    if missing := missing_report_package():
        warn(f"no report: {missing}; then python -m distlenet.report {run_dir} writes it")
        return False
    command = [sys.executable, "-m", "distlenet.report", run_dir]
    env = environment_outside_job()  # a rank ends its parent process, torchrun's agent, for an error of the user
    try:
        status = subprocess.run(command, env=env, timeout=REPORT_TIMEOUT_S).returncode
        reason = f"the command ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        reason = f"the command took more than {REPORT_TIMEOUT_S:.0f} s"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        warn(f"no report: {reason}; python -m distlenet.report {run_dir} writes it")
    return not reason


make_callable(__name__)

if __name__ == "__main__":
    run_entry(main)
