"""What preflight has all ranks do together: add numbers, and take the first steps of the run."""

import contextlib
import secrets
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distlenet.config.schema import Config
from distlenet.data.sources import load_on_node
from distlenet.distributed.collectives import broadcast_object, raise_on_all_ranks
from distlenet.distributed.context import DistributedContext, init_distributed
from distlenet.distributed.preemption import handle_preemption
from distlenet.preflight.allreduce import SIZES, Timing, slow_pairs, time_all_reduces, wrong_sums
from distlenet.preflight.finding import Finding
from distlenet.preflight.run_dir import remove_made
from distlenet.tracking.base import Trackers
from distlenet.training.trainer import Trainer
from distlenet.utils.errors import UserError

GRADIENT = [1 << 18]
"""Bytes of the one all-reduce that is timed unasked: about this network's gradient."""


@dataclass
class PreflightReport:
    """What is known so far."""

    findings: list[Finding]
    timing: Timing | None = None
    slow_pairs: list[tuple[str, str, float]] | None = None  # two hosts, and how many times the median; if looked for

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return all(finding.status != "FAIL" for finding in self.findings)


def together(checkup: PreflightReport, config: Config, here: Store, all_sizes: bool) -> None:
    """Form the group that training would, add numbers, and take one real training step. A collective."""
    with init_distributed(config, store=here) as context:
        env, device = context.env, context.device
        if env.world_size > 1:
            wrong = wrong_sums(env.rank, env.world_size, device)
            timing = checkup.timing = time_all_reduces(SIZES if all_sizes else GRADIENT, device)
            checkup.findings += sums(wrong, timing, context.backend)
            hosts = [""] * env.world_size
            dist.all_gather_object(hosts, socket.gethostname() if env.local_rank == 0 else "")
            leaders = [rank for rank, host in enumerate(hosts) if host]
            if all_sizes and len(leaders) > 1:
                slow = [(hosts[a], hosts[b], times) for a, b, times in slow_pairs(leaders, env.rank, device)]
                checkup.slow_pairs = slow
                text = ", ".join(f"{one} – {other} {times:.1f}×" for one, other, times in slow[:4])
                checkup.findings.append(
                    Finding(
                        "pairs of nodes", "note", f"slower than the median: {text}", "look at their cables and switch"
                    )
                    if slow
                    else Finding("pairs of nodes", "ok", "none takes twice the median")
                )
        checkup.findings.append(first_step(config, context))


def sums(wrong: int, timing: Timing, backend: str) -> list[Finding]:
    """Judge the all-reduces."""
    if wrong:
        return [Finding("all-reduce", "FAIL", f"{wrong} of 65,536 sums are wrong", "look at network cards and GPUs")]
    largest = max(timing.seconds)
    speed = largest / timing.seconds[largest] / 1e9
    text = f"{backend}, sums right; {largest:,} bytes in {1e3 * timing.seconds[largest]:.2f} ms ({speed:.2f} GB/s)"
    if len(timing.seconds) > 1:
        text += f"; of few bytes {1e3 * timing.latency_s:.2f} ms"
    return [Finding("all-reduce", "ok", text)]


def first_step(config: Config, context: DistributedContext) -> Finding:
    """Take the first step of the run, in a folder of its own that is removed again. A collective."""
    quiet = replace(
        config,
        checkpoint=replace(config.checkpoint, resume="never"),
        data=replace(config.data, ledger=False),
    )
    data = load_on_node(config.data, context.env)
    scratch = Path(broadcast_object(f"{config.run.dir}/.preflight-step-{secrets.token_hex(4)}"))
    try:
        with raise_on_all_ranks():
            if context.env.rank == 0:
                try:
                    (scratch / "checkpoints").mkdir(parents=True)
                except OSError as error:
                    raise UserError(f"{scratch}: cannot be written: {error.strerror or error}") from error
        with handle_preemption(1.0) as preemption:
            trainer = Trainer(quiet, context, data, scratch, Trackers(), preemption)
            try:
                trainer.start()
                trainer.feed.sampler.set_position(0, 0, most=2)
                started = time.perf_counter()
                for batch in trainer.feed.train:
                    started = time.perf_counter()
                    trainer.train_step(*batch)
                trainer.check()  # host sync
                seconds = time.perf_counter() - started
            finally:
                trainer.checkpointer.close()
                trainer.take_step.close()
        loss = trainer.meter.window().loss  # collective, host sync
    finally:
        if context.env.rank == 0:
            remove(scratch)
            remove_made(config)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU" if context.device.type == "cuda" else ""
    return Finding("training step", "ok", f"{1e3 * seconds:.1f} ms, loss {loss:.3f}{memory}")


def remove(scratch: Path) -> None:
    """Remove what a step has left."""
    with contextlib.suppress(OSError):
        for path in sorted(scratch.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        scratch.rmdir()
