"""The checks that need a process group: all-reduces, and the first two training steps of the run."""

import contextlib
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.checkpoint.archive import count_bytes
from distlenet.config.loading import runs_directory
from distlenet.config.schema import Config
from distlenet.distributed.collectives import all_gather_object, broadcast_object, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.distributed.preemption import Preemption
from distlenet.preflight.allreduce import SIZES, Timing, slow_pairs, time_all_reduces, wrong_sums
from distlenet.preflight.finding import Finding, PreflightReport
from distlenet.tasks.registry import make_task, reads_images
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer

GRADIENT_BYTES = 1 << 18
"""About the size of LeNet's gradients: the only all-reduce that is timed without ``--allreduce``."""


def run_collective_checks(report: PreflightReport, config: Config, store: Store, all_sizes: bool) -> None:
    """Form the process group, check and time all-reduces, and train two steps; add to ``report``. A collective."""
    with init_distributed(config, store=store) as context:
        env, device = context.env, context.device
        if env.world_size > 1:
            wrong = wrong_sums(env.rank, env.world_size, device)
            report.timing = time_all_reduces(SIZES if all_sizes else [GRADIENT_BYTES], device)
            report.findings.append(check_all_reduce(wrong, report.timing, context.backend))
            hosts = all_gather_object(socket.gethostname() if env.local_rank == 0 else "")
            leaders = [rank for rank, host in enumerate(hosts) if host]
            if all_sizes and len(leaders) > 1:
                report.slow_pairs = [(hosts[a], hosts[b], t) for a, b, t in slow_pairs(leaders, env.rank, device)]
                report.findings.append(check_pairs(report.slow_pairs))
        report.findings += take_trial_step(config, context)


def check_all_reduce(wrong: int, timing: Timing, backend: str) -> Finding:
    """Check that all sums are right, and report the speed."""
    if wrong:
        return Finding("all-reduce", "FAIL", f"{wrong} of 65,536 sums are wrong", "check network cards and GPUs")
    size, seconds = max(timing.seconds.items())
    speed = f"{size:,} bytes in {1e3 * seconds:.2f} ms ({size / seconds / 1e9:.2f} GB/s)"
    latency = f"; latency {1e3 * timing.latency_s:.2f} ms" if len(timing.seconds) > 1 else ""
    return Finding("all-reduce", "ok", f"{backend}, sums right; {speed}{latency}")


def check_pairs(slow: list[tuple[str, str, float]]) -> Finding:
    """Check that no pair of nodes is much slower than the median."""
    if slow:
        found = ", ".join(f"{a} – {b} {times:.1f}×" for a, b, times in slow[:4])
        return Finding("pairs of nodes", "note", f"slower than the median: {found}", "check their cables and switch")
    return Finding("pairs of nodes", "ok", "none takes twice the median")


def take_trial_step(config: Config, context: DistributedContext) -> list[Finding]:
    """Take the first two steps of the run in a temporary directory; check speed and checkpoint size. A collective."""
    config = replace(config, data=replace(config.data, ledger=False, build_cache=False))
    task = make_task(config)
    with contextlib.ExitStack() as stack:
        name = ""
        with raise_on_all_ranks():
            if context.env.rank == 0:
                name = stack.enter_context(
                    TemporaryDirectory(prefix=".preflight-", dir=runs_directory(config), ignore_cleanup_errors=True)
                )
        trial_dir, preemption = Path(broadcast_object(name)), stack.enter_context(contextlib.closing(Preemption(1.0)))
        trial_config = replace(config, checkpoint=replace(config.checkpoint, resume="never"))
        trainer = Trainer(trial_config, context, task, trial_dir, Trackers(), preemption)
        stack.callback(trainer.close)
        trainer.start()
        started = time.perf_counter()
        for batch in trainer.loader.epoch(0, start=0, stop=2):
            started = time.perf_counter()
            trainer.step(batch)
        trainer.check_finite()  # host sync
        seconds = time.perf_counter() - started
        loss = trainer.meter.window().means["loss"]  # collective, host sync
        state = trainer.state_dict()  # collective, host sync
        checkpoint_bytes = count_bytes(state) if context.env.rank == 0 else 0
    device = context.device
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of GPU" if device.type == "cuda" else ""
    step = Finding("training step", "ok", f"{1e3 * seconds:.1f} ms, loss {loss:.3f}{memory}")
    data = [] if reads_images(config) else [describe_datasets(trainer)]
    return [*data, step, check_disk_space(config, checkpoint_bytes, shutil.disk_usage(runs_directory(config)).free)]


def describe_datasets(trainer: Trainer) -> Finding:
    """Report the datasets of a task that does not use ``data.name``."""
    datasets = {"train": trainer.loader.batched.dataset}
    datasets |= {split: loader.batched.dataset for split, loader in trainer.evaluator.loaders.items()}
    text = (f"{split}: {type(dataset).__name__}, {len(dataset):,} samples" for split, dataset in datasets.items())
    return Finding("data", "ok", "; ".join(text))


def check_disk_space(config: Config, checkpoint_bytes: int, free_bytes: int) -> Finding:
    """Check that the checkpoints of a run fit on the disk of the run directory."""
    count = config.checkpoint.keep_last + 2  # the newest ones, the best, and the one being written
    needed = count * checkpoint_bytes
    if free_bytes < needed:
        free = f"{runs_directory(config)} has {free_bytes / 1e6:,.1f} MB free"
        found = f"{free}, {count} checkpoints take {needed / 1e6:,.1f} MB"
        hint = "free some space, give another run.dir, or a smaller checkpoint.keep_last"
        return Finding("disk space", "FAIL", found, hint)
    return Finding("disk space", "ok", f"for the {config.checkpoint.keep_last} newest checkpoints and the best")
