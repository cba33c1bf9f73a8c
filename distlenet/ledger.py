"""``python -m distlenet.ledger RUN``: did each epoch use each training image exactly once?"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from distlenet.config.arguments import Parser
from distlenet.data.sample_log import read_starts
from distlenet.distributed.entry_point import run_entry
from distlenet.utils.errors import UserError


def main() -> None:
    """Print one line per epoch, and leave with status 1 where one is wrong."""
    parser = Parser("python -m distlenet.ledger", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, trained with data.ledger=true")
    lines, right = report(parser.parse_args().run)
    print("\n".join(lines))
    if not right:
        sys.exit(1)


def report(run: Path) -> tuple[list[str], bool]:
    """Check the ledger of a run folder: a line per epoch, and whether all are right.

    Raises UserError where there is no ledger, or what is in it is not as a run writes it.
    """
    history = read_starts(run)
    if not history:
        raise UserError(f"{run}: has no ledger; give a run folder, trained with data.ledger=true")
    facts = history[-1].facts()
    samples, batch, steps = facts["samples"], facts["global_batch_size"], facts["steps_per_epoch"]
    used: dict[int, Counter[int]] = defaultdict(Counter)
    for number, start in enumerate(history):
        # What a later start trained again was lost with the process that had trained it first.
        end = min((later.step for later in history[number + 1 :]), default=sys.maxsize)
        for line in start.lines():
            if line["step"] < end:
                used[line["epoch"]].update(line["indices"])
    lines, right = [], True
    dropped = max(0, samples - batch * steps)
    for epoch in range(max(used, default=-1) + 1):
        counts = used[epoch]
        wanted = samples - dropped
        if epoch == max(used) and counts.total() < wanted and max(counts.values(), default=1) == 1:
            lines.append(f"epoch {epoch + 1}: under way, {counts.total()} of {wanted} images, each once")
            continue
        repeated = sorted(index for index, times in counts.items() if times > 1)
        left = sorted(set(range(samples)) - counts.keys())
        right &= not repeated and len(left) == dropped
        told = f"epoch {epoch + 1}: {len(counts)} of {samples} images used, {len(repeated)} more than once"
        if repeated:
            told += f" (such as {repeated[0]})"
        if dropped:
            told += f", {len(left)} left out, of which {dropped} are the dropped last batch: {_some(left)}"
        elif left:
            told += f", {len(left)} left out (such as {left[0]})"
        lines.append(told)
    lines.append(f"{len(history)} starts: " + ("every epoch is right" if right else "NOT every epoch is right"))
    return lines, right


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:20])) + (", ..." if len(indices) > 20 else "")


if __name__ == "__main__":
    run_entry(main)
