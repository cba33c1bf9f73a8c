"""The train command, with events before steps, ``FILE 40=hang 42=raise SETTING...``; prints what the runtime counted.

Events: hang (the collectives from now on wait for a peer that never answers), raise (an error), interrupt (that of a
second Ctrl-C), ctrl_c (SIGINT), terminate (SIGTERM), memory (print the bytes on the device).
"""

import json
import re
import signal
import sys
import time

import torch

from distlenet.data.loader import Batch
from distlenet.distributed.entry_point import run_entry
from distlenet.train import main
from distlenet.training.step_result import StepResult
from distlenet.training.trainer import Trainer
from fake_cuda import runtime

EVENT = re.compile(r"(\d+)=(\w+)")
EVENTS = [match.groups() for match in map(EVENT.fullmatch, sys.argv[1:]) if match]
hung_at: float | None = None


def happen(event: str) -> None:
    global hung_at
    if event == "hang":
        runtime.hang(0)
        hung_at = time.monotonic()
    elif event == "raise":
        raise RuntimeError("on purpose")
    elif event == "interrupt":
        raise KeyboardInterrupt
    elif event == "ctrl_c":
        signal.raise_signal(signal.SIGINT)
    elif event == "terminate":
        signal.raise_signal(signal.SIGTERM)
    elif event == "memory":
        sys.stdout.write(f"memory {runtime.device_bytes()} {torch.cuda.memory_allocated()}\n")
    else:
        raise ValueError(event)


class TrainerWithEvents(Trainer):
    """Let each event happen before its step."""

    def step(self, batch: Batch) -> StepResult:
        for step, event in EVENTS:
            if int(step) == self.state.step:
                happen(event)
        return super().step(batch)


def train() -> None:
    try:
        main(trainer_class=TrainerWithEvents)
    finally:
        waited = {} if hung_at is None else {"seconds after the hang": time.monotonic() - hung_at}
        counts = {what: n for what, n in runtime.counts().items() if not what.startswith("kernel ")}
        sys.stdout.write("report " + json.dumps({**counts, **waited, "notes": runtime.notes()}) + "\n")


if __name__ == "__main__":
    sys.argv[1:] = [word for word in sys.argv[1:] if not EVENT.fullmatch(word)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    run_entry(train)
