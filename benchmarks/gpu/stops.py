"""Stops while a captured graph is in use: an exception, signals, and what a resumed run computes."""

import re
import signal
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu.options import Options
from gpu.raising import MESSAGE
from gpu.result import Result, table
from gpu.runs import LIMIT_S, Ended, command, difference, execute, graph_warning

EPOCHS = 40
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
HEADER = ("signal", "exit status", "seconds until the exit", "resumed and uninterrupted")


def ask(result: Result, options: Options) -> None:
    """Stop runs in all ways at the same time, and compare what the resumed ones compute with an uninterrupted run."""
    settings = ["train.cuda_graph=auto", f"train.epochs={EPOCHS}", "train.global_batch_size=256"]
    settings += [] if options.scale == 1 else ["data.name=digits"]
    limit_s = options.required["exit_s"]
    with tempfile.TemporaryDirectory(prefix="stops-") as scratch, ThreadPoolExecutor() as pool:
        full = Path(scratch) / "full"
        uninterrupted = pool.submit(execute, command(full, *settings))
        runs = {number: Path(scratch) / number.name for number in STATUS}
        stopped = {number: pool.submit(stop, command(run, *settings), run, number) for number, run in runs.items()}
        exception(result, limit_s, Path(scratch) / "raising")
        rows = []
        for number, run in runs.items():
            ended, after_s = stopped[number].result()
            failed = [other for other in (execute(command(run, *settings)), uninterrupted.result()) if other.status]
            equal = failed[0].reason() if failed else difference(full, run) or "equal"
            rows.append((number.name, ended.status, f"{after_s:.1f}", equal))
            text = f"{number.name} during replay: exit status {STATUS[number]} within {limit_s:g} s"
            as_expected = ended.status == STATUS[number] and after_s < limit_s
            result.promise(text, as_expected, f"status {ended.status} after {after_s:.1f} s")
            result.promise(f"{number.name}: the resumed run equals an uninterrupted one", equal == "equal", equal)
            result.show("signals", table(HEADER, rows, left=2))


def stop(words: list[str], run: Path, number: signal.Signals) -> tuple[Ended, float]:
    """Start a run, send it a signal after its first checkpoint; return how it ended, and how long after the signal."""
    started = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and time.monotonic() < started + LIMIT_S:
        if any(run.glob("checkpoints/step-*.pt")):
            break
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(number)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        stdout, stderr = process.communicate()
    return Ended(process.returncode, stdout, stderr, time.monotonic() - started), time.monotonic() - sent


def exception(result: Result, limit_s: float, run: Path) -> None:
    """Add the promises about an exception while the graph, with NCCL's kernels in it, is in use."""
    ended = execute(command(run, "data.name=gpu.raising:datasets", "train.epochs=1000", "train.cuda_graph=auto"))
    now, raised = time.time(), re.search(r"raised at ([\d.]+)", ended.stderr)
    after_s = now - float(raised[1]) if raised else float("inf")
    warning = graph_warning(ended.stderr)
    text = f"an exception with a captured graph ends the process within {limit_s:g} s, with status 1"
    in_time = ended.status == 1 and after_s < limit_s and not warning
    result.promise(text, in_time, warning or f"status {ended.status} after {after_s:.1f} s")
    printed = f"RuntimeError: {MESSAGE}" in ended.stderr
    result.promise("the exception is printed", printed, "" if printed else ended.reason())
