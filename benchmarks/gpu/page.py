"""The page that ``make gpu-report`` writes."""

from collections.abc import Sequence

from gpu.questions import Answer
from gpu.result import listing, table

HEAD = """\
# On a GPU

Written by `make gpu-report`, which asks every question that only a GPU can answer. Each question runs in a separate
process with a time limit; a question that fails or does not fit in the time is a broken promise.
"""


def page(answers: Sequence[Answer], facts: Sequence[tuple[str, str]], scale: float) -> str:
    """Return the page as Markdown: the machine, the promises, and what each question found."""
    parts = [HEAD]
    if scale != 1:
        parts.append(f"**Sizes and steps were scaled by {scale:g}: the figures below are not measurements.**\n")
    parts += [table(("", ""), facts, left=2) + "\n", "## Promises\n"]
    rows = [
        ("ok" if promise.ok else "**FAIL**", promise.text, promise.detail)
        for answer in answers
        for promise in answer.promises
    ]
    parts.append(table(("", "promise", "found"), rows, left=3) + "\n")
    for answer in answers:
        parts.append(f"## {answer.question.title}\n")
        parts += [f"{text}\n" for text in answer.result.parts.values()]
        parts.append(f"`{answer.question.name}`: {answer.status}, {answer.seconds:.0f} s.\n")
        if answer.tail:
            parts.append(f"{listing(answer.tail)}\n")
    return "\n".join(parts)


def broken(answers: Sequence[Answer]) -> int:
    """Return the number of broken promises."""
    return sum(not promise.ok for answer in answers for promise in answer.promises)
