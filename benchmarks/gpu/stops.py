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
from gpu.runs import AT_ONCE, LIMIT_S, Ended, command, difference, execute, graph_warning

EPOCHS = 40
BATCH, STEPS_BEFORE = 128, 128  # before the exception: long after a capture
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
HEADER = ("signal", "exit status", "seconds until the exit", "resumed and uninterrupted")


def ask(result: Result, options: Options) -> None:
    """Stop runs in all ways at the same time, and compare what the resumed ones compute with an uninterrupted run."""
    settings = ["train.cuda_graph=auto", f"train.epochs={options.size(EPOCHS, 4)}"]
    settings += ["train.global_batch_size=256"] if options.scale == 1 else ["data.name=digits"]
    limit_s, before = options.required["exit_s"], options.size(STEPS_BEFORE, 20) * BATCH
    data = ["data.name=gpu.raising:datasets", f"data.args.before={before}", f"train.global_batch_size={BATCH}"]
    with tempfile.TemporaryDirectory(prefix="stops-") as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        directory, rows = Path(scratch), []
        raising = command(directory / "raising", *data, "train.epochs=1000", "train.cuda_graph=auto")
        raised = pool.submit(lambda: (execute(raising), time.time()))
        uninterrupted = pool.submit(execute, command(directory / "full", *settings))
        runs = {number: directory / number.name for number in STATUS}
        stopped = {number: pool.submit(stop, command(run, *settings), run, number) for number, run in runs.items()}
        exception(result, limit_s, *raised.result())
        for number, run in runs.items():
            ended, after_s, resumed = stopped[number].result()
            failed = [other for other in (resumed, uninterrupted.result()) if other.status]
            equal = failed[0].reason() if failed else difference(directory / "full", run) or "equal"
            rows.append((number.name, ended.status, f"{after_s:.1f}", equal))
            text = f"{number.name} during replay: exit status {STATUS[number]} within {limit_s:g} s"
            as_expected = ended.status == STATUS[number] and after_s < limit_s
            result.promise(text, as_expected, f"status {ended.status} after {after_s:.1f} s")
            result.promise(f"{number.name}: the resumed run equals an uninterrupted one", equal == "equal", equal)
            result.show("signals", table(HEADER, rows, left=2))


def stop(words: list[str], run: Path, number: signal.Signals) -> tuple[Ended, float, Ended]:
    """Start a run, send it a signal after its first checkpoint, and resume it.

    Return how it ended, how many seconds after the signal, and how the resumed run ended.
    """
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
    after_s = time.monotonic() - sent
    return Ended(process.returncode, stdout, stderr, time.monotonic() - started), after_s, execute(words)


def exception(result: Result, limit_s: float, ended: Ended, end: float) -> None:
    """Add the promises about an exception while the graph, with NCCL's kernels in it, is in use."""
    raised = re.search(r"raised at ([\d.]+)", ended.stderr)
    after_s, warning = end - float(raised[1]) if raised else float("inf"), graph_warning(ended.stderr)
    text = f"an exception with a captured graph ends the process within {limit_s:g} s, with status 1"
    in_time = ended.status == 1 and after_s < limit_s and not warning
    result.promise(text, in_time, warning or f"status {ended.status} after {after_s:.1f} s")
    printed = f"RuntimeError: {MESSAGE}" in ended.stderr
    result.promise("the exception is printed", printed, "" if printed else ended.reason())
