"""``python -m distlenet.tracking.sender RUN NAME...``: send a run's records on. ``Sidecar`` starts this process.

Standard input has two lines: what to send (JSON), when the training starts, and its outcome (finished, preempted or
failed). End of file means that the training process has exited.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread, Timer
from typing import Protocol

from filelock import FileLock, Timeout

from distlenet.tracking.base import TEST_FILE, Record
from distlenet.tracking.mlflow import Mlflow
from distlenet.tracking.priority import lower_priority, set_session_share
from distlenet.tracking.prometheus import Prometheus
from distlenet.tracking.sidecar import EXIT_S, NAMES
from distlenet.tracking.tensorboard import TensorBoard
from distlenet.tracking.wandb import Wandb
from distlenet.utils.errors import describe_error, warn

POLL_S = 0.5  # between two reads of metrics.jsonl


class Sink(Protocol):
    """A service that receives records."""

    def put(self, record: Record) -> None:
        """Send one record."""

    def flush(self) -> None:
        """Send the records that were put and are kept so far."""

    def mark_replayed(self) -> None:
        """Note that all records from before this start were put."""

    def finish(self, outcome: str, summary: Record, details: Record) -> None:
        """End the run; ``outcome`` is finished, preempted or failed. Records that do not exist are empty."""


class JsonlTail:
    """The records of a file to which lines are being appended."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def new_records(self) -> Iterator[Record]:
        """Yield the complete lines since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


def make_sinks(run_dir: Path, job: Record) -> dict[str, Sink]:
    """Create the sinks that ``job`` names, except those that fail."""
    sinks: dict[str, Sink] = {}
    for name in job["sinks"]:
        with drop_on_error(sinks, name):
            if name == "wandb":
                sinks[name] = Wandb(run_dir, job["config"], job["run_info"], job["wandb_mode"])
            elif name == "mlflow":
                sinks[name] = Mlflow(run_dir, job["config"], job["run_info"])
            elif name == "prometheus":
                sinks[name] = Prometheus(run_dir, job["config"], job["run_info"])
            else:
                sinks[name] = TensorBoard(run_dir, job["run_info"])
    return sinks


@contextmanager
def drop_on_error(sinks: dict[str, Sink], name: str) -> Iterator[None]:
    """On an error, warn and remove the sink; training and the other sinks continue."""
    try:
        yield
    except Exception as error:
        sinks.pop(name, None)
        later = "python -m distlenet.report RUN --replay-wandb" if name == "wandb" else "a later start of the run"
        unless = "" if name == "wandb" else ", unless it is complete"
        warn(f"{NAMES[name]}: {describe_error(error)}; nothing more is sent there now; {later} sends the rest{unless}")


def send(run_dir: Path, sinks: dict[str, Sink], statuses: Iterator[str]) -> None:
    """Send the records until a status is not "running" but the run's outcome. Remove sinks that fail."""
    tail = JsonlTail(run_dir / "metrics.jsonl")

    def each(action: Callable[[Sink], None]) -> None:
        for name, sink in list(sinks.items()):
            with drop_on_error(sinks, name):
                action(sink)

    def put_new_records() -> None:
        for record in tail.new_records():
            each(lambda sink: sink.put(record))  # noqa: B023
        each(lambda sink: sink.flush())

    put_new_records()
    each(lambda sink: sink.mark_replayed())
    outcome = "running"
    while outcome == "running":
        outcome = next(statuses, "failed")
        put_new_records()
    summary = read_json(run_dir / "summary.json") if outcome == "finished" else {}
    details = read_json(run_dir / TEST_FILE)
    each(lambda sink: sink.finish(outcome, summary, details))


def read_json(path: Path) -> Record:
    """Read a JSON file; return an empty record if there is none."""
    content: Record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def receive(lines: Iterator[str], job: Future[Record], outcome: Future[str]) -> None:
    """Receive what the training process sends. Runs in a thread, since W&B may block the main thread for minutes.

    Exits the process if the training ends before its start, or if sending takes too long after its end.
    """
    if not (first := next(lines, "")):
        os._exit(0)  # W&B's process then exits, too
    job.set_result(json.loads(first))
    outcome.set_result(next(lines, "failed").strip())
    timer = Timer(job.result()["config"]["wandb"]["finish_timeout_s"] + EXIT_S, os._exit, (1,))
    timer.daemon = True  # Sidecar.close ends this process earlier, unless the training process was killed
    timer.start()
    set_session_share(0)


def statuses(outcome: Future[str]) -> Iterator[str]:
    """Yield "running" every POLL_S, then the outcome."""
    while not wait([outcome], POLL_S).done:
        yield "running"
    yield outcome.result()


def main() -> None:
    """Start W&B's process while the ranks initialize, then send."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are for the training; its outcome arrives on standard input
    lower_priority()
    run_dir, sinks = Path(sys.argv[1]), sys.argv[2:]
    job, outcome = Future[Record](), Future[str]()
    Thread(target=receive, args=(iter(sys.stdin), job, outcome), daemon=True).start()
    if "wandb" in sinks:
        with suppress(Exception):  # reported when the sink is created
            importlib.import_module("wandb").setup()
    if not outcome.done():
        set_session_share(19)
    finish_timeout_s = job.result()["config"]["wandb"]["finish_timeout_s"]
    lock = FileLock(run_dir / ".sidecar.lock")
    with suppress(Timeout):  # the sidecar of an earlier start ends soon, unless a lost node holds the lock
        lock.acquire(finish_timeout_s + 2 * EXIT_S)
    send(run_dir, make_sinks(run_dir, job.result()), statuses(outcome))


if __name__ == "__main__":
    main()
