"""``make gpu-report``: everything that only a GPU can answer; writes ``benchmarks/GPU.md``.

Takes about 11 minutes on one GPU with 16 CPU cores, PyTorch 2.11 or newer. Each question runs in a separate process
with a time limit, the most valuable first; the page is written after each. The exit status is 1 if a promise is broken,
or a question failed or did not fit in the time, and 2 if something is missing.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu.machine import declared_dependencies, facts, missing
from gpu.options import REQUIRED, Options, parse_requirement
from gpu.page import broken, page
from gpu.questions import Answer, Question, ask_all

QUESTIONS = (
    Question("recipe", "The default recipe", "gpu.recipe:ask", 120, 200),
    Question("bits", "Replay equals eager, and a repetition", "gpu.bits:ask", 90, 180),
    Question("speed-bf16", "Speed in bf16", "gpu.speed:bf16", 60, 150),
    Question("stops", "Stops during replay", "gpu.stops:ask", 45, 120),
    Question("speed-fp32", "Speed in fp32", "gpu.speed:fp32", 60, 150),
    Question("syncs", "Host syncs between log points", "gpu.syncs:ask", 20, 60),
    Question("tests", "Tests that need a GPU", "gpu.suite:ask", 85, 180),
    Question("resnet", "ResNet-18", "gpu.resnet:ask", 40, 100),
    Question("modes", "Other modes", "gpu.modes:ask", 45, 100),
    Question("speed-fp16", "Speed in fp16", "gpu.speed:fp16", 60, 150),
)


def run(
    questions: Sequence[Question], options: Options, budget_s: float, out: Path, head: list[tuple[str, str]]
) -> int:
    """Ask the questions, write the page after each, and return the number of broken promises."""

    def report(answers: list[Answer]) -> None:
        new = out.with_suffix(".new")
        new.write_text(page(answers, head, options.scale))
        new.rename(out)
        if asked := [answer for answer in answers if answer.status != "not run"]:
            last, kept = asked[-1], sum(promise.ok for promise in asked[-1].promises)
            line = f"{last.question.name}: {last.status}, {kept} of {len(last.promises)} promises, {last.seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)

    return broken(ask_all(questions, options, budget_s, report))


def main(questions: Sequence[Question] = QUESTIONS) -> None:
    """Ask all questions, or some of them."""
    started, names = time.monotonic(), [question.name for question in questions]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--budget-s", type=float, default=720, help="seconds for everything (720)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("GPU.md"), help="the page (GPU.md)")
    parser.add_argument("--steps-scale", type=float, default=1, help="factor of steps and sizes, for a trial (1)")
    limits = ", ".join(f"{name}={value:g}" for name, value in REQUIRED.items())
    parser.add_argument("--require", action="append", default=[], metavar="NAME=NUMBER", help=f"a limit ({limits})")
    arguments = parser.parse_args()
    try:
        options = Options({**REQUIRED, **dict(map(parse_requirement, arguments.require))}, arguments.steps_scale)
        if packages := missing(declared_dependencies()):
            fix = "pip install them, or see docs/benchmarks.md for a machine without a network"
            raise RuntimeError(f"not installed: {', '.join(packages)}; {fix}")
        head = facts(["make gpu-report", *([f'ARGS="{" ".join(sys.argv[1:])}"'] if sys.argv[1:] else [])])
    except (ValueError, RuntimeError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        sys.exit(2)
    selected = [question for question in questions if question.name in arguments.only]
    failed = run(selected, options, arguments.budget_s - (time.monotonic() - started), arguments.out, head)
    print(f"{arguments.out}: {failed} broken promises, {time.monotonic() - started:.0f} s", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
