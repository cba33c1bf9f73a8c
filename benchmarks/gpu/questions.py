"""Ask each question in a separate process with a time limit, in order, within a budget of time."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpu.options import Options
from gpu.result import Promise, Result, load

REPO = Path(__file__).resolve().parents[2]
TAIL_LINES = 40  # of the output of a question that failed


@dataclass(frozen=True)
class Question:
    """A function ``module:name(result, options)`` that adds its findings to a result."""

    name: str
    title: str
    function: str
    expected_s: float  # not started if less time is left
    limit_s: float  # ended after this time


@dataclass(frozen=True)
class Answer:
    """What became of a question."""

    question: Question
    status: str  # answered, failed or not run
    result: Result
    seconds: float = 0.0
    tail: str = ""  # the last lines of the output, if it failed

    @property
    def promises(self) -> list[Promise]:
        """Return the promises of the question; a question without an answer has a broken one."""
        if self.status == "answered":
            return self.result.promises
        return [*self.result.promises, Promise(f"the question is answered: {self.question.title}", False, self.status)]


def ask(question: Question, options: Options, limit_s: float) -> Answer:
    """Run one question in a separate process, and end it, and what it started, at the latest after ``limit_s``."""
    with tempfile.TemporaryDirectory(prefix="gpu-report-", ignore_cleanup_errors=True) as scratch:
        path, log = Path(scratch) / "result.json", Path(scratch) / "log"
        words = [str(Path(__file__).with_name("child.py")), question.function, str(path), options.to_json()]
        started, status = time.monotonic(), "answered"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=REPO,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                if process.wait(limit_s):
                    status = f"failed: exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                status = f"failed: still running after {limit_s:.0f} s"
            finally:  # also at Ctrl-C
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        lines = [] if status == "answered" else log.read_text(errors="replace").splitlines()
        return Answer(question, status, load(path), time.monotonic() - started, "\n".join(lines[-TAIL_LINES:]))


def ask_all(
    questions: Iterable[Question], options: Options, budget_s: float, report: Callable[[list[Answer]], None]
) -> list[Answer]:
    """Ask the questions that fit in the remaining time; call ``report`` with all answers after each question."""
    started = time.monotonic()
    answers = [Answer(question, "not run", Result(Path())) for question in questions]
    report(answers)
    for number, answer in enumerate(answers):
        question, left_s = answer.question, budget_s - (time.monotonic() - started)
        if question.expected_s * options.scale > left_s:
            answers[number] = replace(answer, status=f"not run: {max(0.0, left_s):.0f} s of the budget were left")
        else:
            limit_s = min(question.limit_s, left_s) if options.scale == 1 else left_s  # a trial may be on any machine
            answers[number] = ask(question, options, limit_s)
        report(answers)
    return answers


def environment() -> dict[str, str]:
    """Return the environment of a question: its imports, one thread per process, no W&B, no launcher."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    path = os.pathsep.join([str(REPO), str(REPO / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
