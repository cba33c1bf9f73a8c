"""``python -m distlenet.prove``: run a user's task in many ways, and report whether all give the same result."""

import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlenet.config.arguments import settings_parser
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.entry_point import run_entry
from distlenet.prove.causes import CAUSES
from distlenet.prove.checks import CONTRACT, Finding
from distlenet.prove.comparison import TOLERANCE, Promise, compare
from distlenet.prove.processes import SERVER_HASH_SEED, ProcessFailed, start
from distlenet.prove.tables import print_cause, print_findings, print_table
from distlenet.prove.trials import Run, check_ledger, plan, settings_of_runs
from distlenet.reduction.batch_size import micro_batch_size
from distlenet.utils.errors import UserError
from distlenet.utils.parser import positive_int
from distlenet.utils.startup import unwind_on


def main() -> None:
    """Check the hooks, then train in many ways and compare; exit with status 1 if a promise is broken."""
    parser = settings_parser("distlenet.prove", "Prove that a task gives the same result however it is run.")
    parser.add_argument("--ranks", nargs="+", metavar="N", default=["1", "2", "4"], help="numbers of ranks (1 2 4)")
    parser.add_argument("--steps", metavar="N", type=positive_int, default=6, help="optimizer steps of each run (6)")
    arguments = parser.parse_intermixed_args()
    ranks = [int(word) for word in arguments.ranks if is_number(word)]
    overrides = [word for word in arguments.ranks if not is_number(word)] + arguments.overrides
    config = load_config(arguments.config, overrides)
    if not ranks or min(ranks) < 1:
        raise UserError(f"--ranks {' '.join(arguments.ranks)}: expected integers, at least 1")
    if arguments.steps < 3:
        raise UserError(f"--steps {arguments.steps}: expected at least 3, since a run is killed twice")
    for count in ranks:
        micro_batch_size(config, count)  # raises UserError, before anything is started
    words = [*(f"--config={path}" for path in arguments.config), *overrides]
    with tempfile.TemporaryDirectory(prefix="prove-") as scratch:
        words += settings_of_runs(config, ranks, arguments.steps)
        proof = Proof(config, words, Path(scratch))
        if not (proof.check_hooks() and proof.compare_runs(plan(ranks, arguments.steps, proof.exact))):
            sys.exit(1)
    print("\nEverything that is promised holds.")


def is_number(word: str) -> bool:
    """Return whether a word of the command line is an integer, and not a setting."""
    return word.isascii() and word.isdecimal()


@dataclass
class Proof:
    """The processes of a proof, and what they found."""

    config: Config
    words: list[str]
    scratch: Path

    @property
    def exact(self) -> bool:
        """Whether the bits must not depend on the number of ranks."""
        return self.config.distributed.reduction == "exact"

    def check_hooks(self) -> bool:
        """Check the hooks in two processes, with other orders of listings and of sets; return whether all hold."""
        with ExitStack() as stack:
            for job in [stack.enter_context(self.start_checks(order, seed)) for order, seed in ORDERS]:
                job.wait()
        result = self.contract("ascending")
        findings = [Finding(*finding) for finding in result["findings"]]
        hooks = {finding.hook or CAUSES[finding.cause].hook for finding in findings if finding.cause}
        names = differing(result["fingerprint"], self.contract("descending")["fingerprint"])
        if not ({"dataset", "model"} & hooks):  # then another process differs for the same reason
            cause = self.cause_between_processes(names[0]) if names else None
            detail = f"{len(names)} values, first {names[0]}" if names else ""
            findings.append(Finding("samples and weights: the same in another process", cause, detail))
        print_findings(findings)
        failed = {(finding.cause, finding.hook): finding for finding in reversed(findings) if finding.cause}
        for (cause, hook), finding in reversed(failed.items()):
            print_cause(str(cause), hook, f"{finding.check}: {finding.detail}")
        return not failed

    def start_checks(self, order: str, hash_seed: int, name: str = "") -> Any:
        """Start the checks of the hooks in a process."""
        return start(self.scratch / (name or order), [f"--contract={order}", *self.words], hash_seed=hash_seed)

    def contract(self, name: str) -> dict[str, Any]:
        """Return the result of such a process."""
        result: dict[str, Any] = json.loads((self.scratch / name / CONTRACT).read_text())
        return result

    def cause_between_processes(self, name: str) -> str:
        """Find out, with a third process, whether the order of listings made the difference."""
        if name.startswith("weights"):
            return "model weights"
        with self.start_checks("ascending", SERVER_HASH_SEED + 1, "third") as job:
            job.wait()
        third = differing(self.contract("ascending")["fingerprint"], self.contract("third")["fingerprint"])
        return "dataset process" if third else "order"

    def compare_runs(self, runs: list[Run]) -> bool:
        """Train in all ways, and print the comparison; return whether everything that is promised holds."""
        print()
        contract, columns = self.contract("ascending"), {}
        causes: dict[str, str] = {}  # {stage: the difference}
        close = not contract["mixes_in_training"]
        for number, run in enumerate(runs):
            directory = self.scratch / f"run-{number}"
            try:
                run.execute(self.words, directory)
                if self.config.data.ledger:
                    check_ledger(directory / "run")
                print(f"trained: {run.name}", flush=True)
            except ProcessFailed as error:
                print(f"\n{run.name}: {error}")
                if "ReplicaMismatch" in str(error):
                    print_cause("replicas", "", "the ranks of one run hold different weights")
                return False
            same_ranks = next(index for index, other in enumerate(runs) if other.ranks[0] == run.ranks[-1])
            reference = 0 if self.exact or same_ranks == number else same_ranks
            if number == 0:
                continue
            promise = Promise(self.exact or same_ranks != number, close, TOLERANCE[contract["precision"]])
            columns[run.name], difference = compare(self.scratch / f"run-{reference}", directory, promise)
            if difference:
                causes.setdefault(difference.stage, f"{difference} with {run.name}")
        print_table(runs[0].name, columns)
        for stage, where in causes.items():
            print_cause(stage, "", where)
        if not self.exact:
            mixes = "a loss depends on its micro-batch (BatchNorm, dropout)" if not close else "see docs/prove.md"
            print(f"\n-: not promised between numbers of ranks with distributed.reduction=ddp: {mixes}")
        return not causes


ORDERS = (("ascending", SERVER_HASH_SEED), ("descending", SERVER_HASH_SEED + 1))
"""The order of listings, and the hash seed, which orders sets, of each process that checks the hooks."""


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """Return the names whose values differ, in order."""
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


if __name__ == "__main__":
    unwind_on(signal.SIGTERM, signal.SIGHUP)
    run_entry(main)
