"""``python -m distlenet.ledger RUN``: check that each epoch used each training sample exactly once."""

import sys
from collections import Counter, defaultdict
from pathlib import Path

from distlenet.data.sample_log import Start, read_starts
from distlenet.distributed.entry_point import run_entry
from distlenet.storage.fetch import fetch_run
from distlenet.utils.errors import UserError
from distlenet.utils.parser import Parser


def main() -> None:
    """Print one line per epoch; exit with status 1 if an epoch is wrong."""
    parser = Parser("python -m distlenet.ledger", description="Check that each epoch used each sample exactly once.")
    parser.add_argument("run", metavar="RUN", help="a run directory, or its URL, trained with data.ledger=true")
    lines, correct = check_run(fetch_run(parser.parse_args().run))
    print("\n".join(lines))
    if not correct:
        sys.exit(1)


def check_run(run_dir: Path) -> tuple[list[str], bool]:
    """Return a line per epoch, and whether every epoch is correct. Raise UserError if the log is missing or damaged."""
    starts = read_starts(run_dir)
    if not starts:
        raise UserError(f"{run_dir}: has no ledger; give a run directory, trained with data.ledger=true")
    info, counts = starts[-1].read_info(), count_uses(starts)
    samples, last = info["samples"], max(counts, default=-1)
    dropped = max(0, samples - info["global_batch_size"] * info["steps_per_epoch"])
    lines, correct = [], True
    for epoch in range(last + 1):
        used = counts[epoch]
        repeated = sorted(index for index, count in used.items() if count > 1)
        if epoch == last and not repeated and len(used) < samples - dropped:
            lines.append(f"epoch {epoch + 1}: incomplete, {len(used)} of {samples} samples so far, each once")
            continue
        unused = sorted(set(range(samples)) - used.keys())
        correct &= not repeated and len(unused) == dropped
        lines.append(
            f"epoch {epoch + 1}: {len(used)} of {samples} samples used, "
            f"{len(repeated)} more than once{_list(repeated)}, {len(unused)} not used{_list(unused)}"
            + (f", {dropped} in the dropped last batch" if dropped else "")
        )
    lines.append(f"{len(starts)} starts: " + ("every epoch is correct" if correct else "NOT every epoch is correct"))
    return lines, correct


def count_uses(starts: list[Start]) -> dict[int, Counter[int]]:
    """Count how often each epoch used each sample; steps that a later start repeated count only there."""
    counts: dict[int, Counter[int]] = defaultdict(Counter)
    for number, start in enumerate(starts, 1):
        end = min((later.step for later in starts[number:]), default=sys.maxsize)
        for line in start.read_lines():
            if line["step"] < end:
                counts[line["epoch"]].update(line["indices"])
    return counts


def _list(indices: list[int]) -> str:
    return f" ({', '.join(map(str, indices[:20]))}{', ...' * (len(indices) > 20)})" if indices else ""


if __name__ == "__main__":
    run_entry(main)
