"""What every command that computes does first: find its place, its device, its precision, and the others."""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import Store

from distlenet.allocator import keep_freed_memory
from distlenet.distributed import pick_backend, pick_device, process_group
from distlenet.errors import warn
from distlenet.failures import telling
from distlenet.graph import use_a_stream
from distlenet.precision import autocast, exact_kernels, pick_precision
from distlenet.ranklog import RankLog
from distlenet.rendezvous import meet_all
from distlenet.schema import Config
from distlenet.watchdog import Watchdog, watching
from distlenet.world import World, threads_from_environ, world_from_environ

BACKSTOP_S = 60.0
"""How much later than the watchdog, who can say more, the backend's own timeout ends a collective."""


@dataclass(frozen=True)
class Session:
    """One rank of a job whose process group is joined."""

    world: World
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
            "world_size": self.world.world_size,
            "backend": self.backend,
            "device": f"{self.device.type} ({name})" if name else self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }


@contextmanager
def open_session(config: Config, folder: Path | None = None, here: Store | None = None) -> Iterator[Session]:
    """Join the job for the length of a ``with`` block; a hang is noted in ``folder``.

    ``here`` is what ``meet_all`` has returned, where the ranks have met before.
    Raises UserError, before the ranks meet, for an environment, device, backend or precision that cannot be.
    """
    world = world_from_environ(os.environ)
    device = pick_device(config.device, world, torch.cuda.device_count())
    if config.device == "auto" and device.type == "cpu" and torch.cuda.device_count() > 0 and world.local_rank == 0:
        warn(
            f"device=auto: training on the CPU, since {world.local_world_size} ranks on this node share "
            f"{torch.cuda.device_count()} GPUs; start a rank per GPU to use them"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        exact_kernels()
        if config.train.cuda_graph == "auto":
            use_a_stream(device)
    backend = pick_backend(config.distributed.backend, device)
    precision = pick_precision(config.precision, device)
    set_threads(config.distributed.threads)
    keep_freed_memory()
    start_s, step_s = config.distributed.start_timeout_s, config.distributed.timeout_s
    trace = folder / "flight-recorder" if folder is not None and backend == "nccl" else None
    if trace is not None:  # before the group is made; see distlenet.watchdog
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # as of torch 2.9, and before
            os.environ.setdefault(name, "2000")
    store = meet_all(world, start_s) if here is None else here
    with (
        process_group(store, world, backend, device, max(start_s, step_s) + BACKSTOP_S),
        closing(RankLog(world, device)) as log,
        watching(store, world, start_s, trace) as watchdog,
        telling(store, world, log),
    ):
        yield Session(world, device, backend, precision, watchdog, log)


def set_threads(threads: int | None) -> None:
    """Choose the CPU threads of this process.

    One where nothing is said: the batches of a rank are small, and results on CPU depend on how a sum is
    cut into threads, so a number taken from the machine would change them with the machine.
    Raises RankError for an OMP_NUM_THREADS that is no number.
    """
    given = threads_from_environ(os.environ)
    if threads is not None or given is None:
        torch.set_num_threads(threads or 1)
