"""The start of every command that computes: environment, device, precision, rendezvous and process group."""

import contextlib
import gc
import os
import stat
from collections.abc import Iterator, MutableMapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from distlenet.config.schema import Config
from distlenet.distributed.device import DTYPES, resolve_backend, resolve_precision
from distlenet.distributed.environment import DistributedEnvironment, read_environment, threads_from_environ
from distlenet.distributed.failures import report_failures
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.rendezvous import convert_rendezvous_errors, rendezvous
from distlenet.distributed.visible_gpus import agree_on_device, visible_gpus
from distlenet.distributed.watchdog import Watchdog, run_watchdog
from distlenet.utils.errors import Preempted, UserError, warn
from distlenet.utils.process import tune_malloc

BACKEND_MARGIN_S = 60.0  # from the watchdog's timeout, whose message is better, to the backend's


@dataclass(frozen=True)
class DistributedContext:
    """One rank of a job that has joined the process group."""

    env: DistributedEnvironment
    device: torch.device
    backend: str
    precision: str
    watchdog: Watchdog
    log: RankLog

    @property
    def broadcast_device(self) -> torch.device:
        """Where the process group communicates; see ``broadcast_state``."""
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def autocast(self) -> torch.autocast:
        """Return autocast for forward pass and loss, disabled for fp32."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def describe(self) -> dict[str, str | int]:
        """Return the ranks, devices and precision of the job as plain values."""
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return {
            "world_size": self.env.world_size,
            "backend": self.backend,
            "device": self.device.type + name,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
        }


@contextmanager
def init_distributed(
    config: Config, run_dir: Path | None = None, store: Store | None = None
) -> Iterator[DistributedContext]:
    """Join the job until the end of the block.

    Only a training gives ``run_dir``, to which NCCL's trace of a hang is written, and touches the heartbeat file: other
    commands take the settings of a checkpoint, and may run elsewhere or next to the training.
    ``store`` is the result of ``rendezvous``, if the ranks have met before. Raise UserError before if a setting or the
    environment is invalid.
    """
    env = read_environment(os.environ)
    heartbeat_file = prepare_heartbeat_file(config.distributed.heartbeat_file) if run_dir is not None else None
    set_threads(config.distributed.threads)
    tune_malloc()
    init_s, step_s = config.distributed.init_timeout_s, config.distributed.step_timeout_s
    store = store or rendezvous(env, init_s)
    choice = agree_on_device(config.device, visible_gpus(config.device), env, store, init_s)
    if choice.error:
        raise UserError(choice.error)
    if choice.warning and env.rank == 0:
        warn(choice.warning)
    device = torch.device(choice.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True  # https://docs.pytorch.org/docs/stable/notes/randomness.html
        torch.backends.cudnn.benchmark = False
        if config.train.cuda_graph == "auto":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # the default stream cannot be captured
    backend = resolve_backend(config.distributed.backend, device)
    precision = resolve_precision(config.precision, device, choice.bf16)
    trace_dir = run_dir / "flight-recorder" if run_dir is not None and backend == "nccl" else None
    if trace_dir is not None:  # before the group is created
        set_flight_recorder_size(os.environ)
    with (
        _process_group(store, env, backend, device, max(init_s, step_s) + BACKEND_MARGIN_S),
        closing(RankLog(env, device)) as log,
        run_watchdog(store, env, init_s, trace_dir, heartbeat_file if env.local_rank == 0 else None) as watchdog,
        report_failures(store, env, log),
    ):
        yield DistributedContext(env, device, backend, precision, watchdog, log)


@contextmanager
def _process_group(
    store: Store, env: DistributedEnvironment, backend: str, device: torch.device, timeout_s: float
) -> Iterator[None]:
    """Join the default process group until the end of the block. Raise RankError if the ranks cannot connect."""
    with convert_rendezvous_errors(env):
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    try:
        yield
    except (UserError, Preempted):  # raised on all ranks
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # let the collective that reported it finish
        raise
    except BaseException:
        # Other ranks may be in a collective: NCCL's destroy waits for them forever, its abort does not.
        if backend == "nccl":
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Gloo's threads end with the last reference to the group, which DistributedDataParallel holds in a cycle. A
        # thread that outlives the interpreter aborts it: exit status 134 after a successful run.
        gc.collect()


def prepare_heartbeat_file(path: str | None) -> Path | None:
    """Return ``distributed.heartbeat_file``. Remove the file of an earlier job, which a probe would take for a hang.

    Raise UserError if it cannot be written, or is anything but an empty file: the end of the job removes it.
    """
    if path is None:
        return None
    file = Path(path)
    if not os.access(file.absolute().parent, os.W_OK):
        raise UserError(f"distributed.heartbeat_file={path}: cannot be written; give a file in a writable directory")
    with contextlib.suppress(FileNotFoundError):  # another rank of this node may have removed it
        if not stat.S_ISREG(file.lstat().st_mode) or file.lstat().st_size > 0:
            raise UserError(f"distributed.heartbeat_file={path}: exists and is not an empty file; give another name")
        file.unlink()
    return file


def set_flight_recorder_size(environ: MutableMapping[str, str]) -> None:
    """Set how many collectives NCCL's flight recorder keeps, unless the user has, also by the former name."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in environ:
        environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads: ``threads``, else OMP_NUM_THREADS, else 1.

    Not torch's default: the batches of a rank are small, and results on CPU depend on the number of threads, so they
    would differ between machines. Raise RankError if OMP_NUM_THREADS is invalid.
    """
    from_environ = threads_from_environ(os.environ)
    if threads is not None or from_environ is None:
        torch.set_num_threads(threads or 1)
