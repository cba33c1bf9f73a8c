"""``python -m distlenet.tracking.sender RUN NAME...``: send a run's records on; ``distlenet.tracking.sidecar`` starts it.

Standard input says, a line each: what to do (JSON), that there is more, and how the run ended. Its end without such a
line says that the training is gone.
"""

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from filelock import FileLock, Timeout

from distlenet.tracking.base import TEST_FILE, Record
from distlenet.tracking.priority import lower_priority, set_session_share
from distlenet.tracking.sidecar import NAMES
from distlenet.tracking.tensorboard import TensorBoard
from distlenet.tracking.wandb import Wandb
from distlenet.utils.errors import warn


class Sink(Protocol):
    """Where records go."""

    def put(self, record: Record) -> None:
        """Take one record."""

    def mark_replayed(self) -> None:
        """All is there that was recorded before this start."""

    def finish(self, outcome: str, summary: Record, details: Record | None) -> None:
        """The run has ended: finished, preempted or failed."""


class JsonlTail:
    """The records of a file to which lines are being added."""

    def __init__(self, path: Path) -> None:
        """Begin at the start of ``path``."""
        self.path, self.offset = path, 0

    def more(self) -> Iterator[Record]:
        """Yield the whole lines since the last call."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


class Sinks:
    """Several, of which one that fails is left out, and said so once."""

    def __init__(self, makers: dict[str, Callable[[], Sink]]) -> None:
        """Make each sink."""
        self.sinks: dict[str, Sink] = {}
        for name, make in makers.items():
            self._guard(name, lambda name=name, make=make: self.sinks.update({name: make()}))  # type: ignore[misc]

    def put(self, record: Record) -> None:
        """Give each sink a record."""
        self.each(lambda sink: sink.put(record))

    def each(self, action: Callable[[Sink], None]) -> None:
        """Do something with each sink that is left."""
        for name, sink in list(self.sinks.items()):
            self._guard(name, lambda sink=sink: action(sink))  # type: ignore[misc]

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training and the other sinks go on
            self.sinks.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())[:300]
            warn(f"{NAMES.get(name, name)}: {reason}; nothing more is sent there, metrics.jsonl has everything")


def make_sinks(folder: Path, start: Record) -> Sinks:
    """Make what ``start`` asks for."""
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: Wandb(folder, start["config"], start["run_info"], start["wandb_mode"]),
    }
    return Sinks({name: make for name, make in makers.items() if name in start["sinks"]})


def send(folder: Path, sinks: Sinks, told: Iterator[str]) -> dict[str, Sink]:
    """Send ``sinks`` what is there, then more whenever ``told``, until it says how the run ended.

    Returns the sinks that took it, by their names.
    """
    tail = JsonlTail(folder / "metrics.jsonl")

    def catch_up() -> None:
        for record in tail.more():
            sinks.put(record)

    catch_up()
    sinks.each(lambda sink: sink.mark_replayed())
    outcome = "failed"
    for line in told:
        if line != "more":
            outcome = line
            break
        catch_up()
    catch_up()
    summary = read_json(folder / "summary.json") if outcome == "finished" else None
    sinks.each(lambda sink: sink.finish(outcome, summary or {}, read_json(folder / TEST_FILE)))
    return sinks.sinks


def read_json(path: Path) -> Record | None:
    """Read a JSON file; None where it is not there."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def listen(lines: Iterator[str], at_start: Callable[[], None], at_end: Callable[[str], None]) -> Iterator[str]:
    """Yield ``lines``, which a thread takes at once, whatever is under way.

    So the training never finds its pipe full, and its start and its end are known also while W&B does not answer:
    then ``at_start`` is called, and ``at_end`` with the first line; with none, where there was no start.
    """
    heard: SimpleQueue[str | None] = SimpleQueue()

    def take() -> None:
        try:
            if first := next(lines, ""):
                heard.put(first)
                at_start()
                for line in lines:
                    heard.put(line)
                    if line != "more":
                        break
            at_end(first)
        finally:
            heard.put(None)

    threading.Thread(target=take, daemon=True).start()
    return iter(heard.get, None)


def get_ready(packages: list[str]) -> None:
    """Import what W&B's client will need, and start its process. What fails here is tried again where it is told."""
    names = {"wandb": ["wandb", "wandb.sdk.launch"], "tensorboard": ["tensorboard.summary"]}  # init imports launch
    for package in packages:
        with suppress(Exception):
            for name in names[package]:
                importlib.import_module(name)
            if package == "wandb":
                importlib.import_module("wandb").setup()


def main() -> None:
    """Get ready while the ranks meet; then send, with the least claim to the processors.

    Never for longer than allowed after the training's end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training takes them; its end says all

    turn, ended = threading.Lock(), threading.Event()

    def make_way() -> None:
        """Leave the processors to the ranks, unless they have ended."""
        with turn:
            if not ended.is_set():
                lower_priority()

    def limit(first: str) -> None:
        if not first:  # the training has ended before it began
            os._exit(0)  # W&B's process sees that, too
        timer = threading.Timer(
            json.loads(first)["config"]["wandb"]["finish_timeout_s"], os.killpg, (0, signal.SIGKILL)
        )
        timer.daemon = True
        timer.start()
        with turn:
            ended.set()
            set_session_share(0)

    told = listen((line.strip() for line in sys.stdin), make_way, limit)
    get_ready(sys.argv[2:])
    start, folder = json.loads(next(told)), Path(sys.argv[1])
    make_way()  # also W&B's process
    lock = FileLock(folder / ".sidecar.lock")
    with suppress(Timeout):  # that of an earlier start ends by itself soon; on another node it may hold the lock
        lock.acquire(start["config"]["wandb"]["finish_timeout_s"] + 5)
    sinks = make_sinks(folder, start)
    make_way()  # and what that has started
    send(folder, sinks, told)


if __name__ == "__main__":
    main()
