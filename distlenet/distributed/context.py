"""What every command that computes does first: find its place, its device, its precision, and the others."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.config.schema import Config
from distlenet.distributed.device import resolve_backend, resolve_device, use_side_stream
from distlenet.distributed.environment import DistributedEnvironment, read_environment, threads_from_environ
from distlenet.distributed.failures import report_failures
from distlenet.distributed.precision import autocast, resolve_precision, use_deterministic_kernels
from distlenet.distributed.process_group import process_group
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.rendezvous import rendezvous
from distlenet.distributed.watchdog import Watchdog, run_watchdog
from distlenet.utils.allocator import tune_malloc
from distlenet.utils.errors import warn

BACKSTOP_S = 60.0
"""How much later than the watchdog, who can say more, the backend's own timeout ends a collective."""


@dataclass(frozen=True)
class DistributedContext:
    """One rank of a job whose process group is joined."""

    env: DistributedEnvironment
    device: torch.device
    backend: str
    precision: str
    watchdog: Watchdog
    log: RankLog

    def autocast(self) -> torch.autocast:
        """Return autocast for the forward pass in this session's precision."""
        return autocast(self.precision, self.device)

    def describe(self) -> dict[str, str | int]:
        """Say where and how this job computes, in plain values."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return {
            "world_size": self.env.world_size,
            "backend": self.backend,
            "device": f"{self.device.type} ({name})" if name else self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }


@contextmanager
def init_distributed(
    config: Config, run_dir: Path | None = None, store: Store | None = None
) -> Iterator[DistributedContext]:
    """Join the job for the length of a ``with`` block; a hang is noted in ``run_dir``.

    ``store`` is what ``rendezvous`` has returned, where the ranks have met before.
    Raises UserError, before the ranks meet, for an environment, device, backend or precision that cannot be.
    """
    env = read_environment(os.environ)
    device = resolve_device(config.device, env, torch.cuda.device_count())
    if config.device == "auto" and device.type == "cpu" and torch.cuda.device_count() > 0 and env.local_rank == 0:
        warn(
            f"device=auto: training on the CPU, since {env.local_world_size} ranks on this node share "
            f"{torch.cuda.device_count()} GPUs; start a rank per GPU to use them"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_deterministic_kernels()
        if config.train.cuda_graph == "auto":
            use_side_stream(device)
    backend = resolve_backend(config.distributed.backend, device)
    precision = resolve_precision(config.precision, device)
    set_threads(config.distributed.threads)
    tune_malloc()
    start_s, step_s = config.distributed.init_timeout_s, config.distributed.step_timeout_s
    trace = run_dir / "flight-recorder" if run_dir is not None and backend == "nccl" else None
    if trace is not None:  # before the group is made; see distlenet.distributed.watchdog
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # as of torch 2.9, and before
            os.environ.setdefault(name, "2000")
    store = store if store is not None else rendezvous(env, start_s)
    with (
        process_group(store, env, backend, device, max(start_s, step_s) + BACKSTOP_S),
        closing(RankLog(env, device)) as log,
        run_watchdog(store, env, start_s, trace) as watchdog,
        report_failures(store, env, log),
    ):
        yield DistributedContext(env, device, backend, precision, watchdog, log)


def set_threads(threads: int | None) -> None:
    """Choose the CPU threads of this process.

    One where nothing is said: the batches of a rank are small, and results on CPU depend on how a sum is
    cut into threads, so a number taken from the machine would change them with the machine.
    Raises RankError for an OMP_NUM_THREADS that is no number.
    """
    given = threads_from_environ(os.environ)
    if threads is not None or given is None:
        torch.set_num_threads(threads or 1)
