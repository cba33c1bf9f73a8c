"""One process of a proof: it checks the hooks, or is one rank of a run. ``distlenet.prove`` starts it."""

from distlenet.utils.process import exit_with_parent

if __name__ == "__main__":
    exit_with_parent()  # before the imports that take seconds

import json
from functools import partial
from pathlib import Path

from distlenet.config.arguments import settings_parser
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.prove.checks import CONTRACT
from distlenet.prove.contract import Contract
from distlenet.prove.listing import sort_listings
from distlenet.prove.recording import Recorder, RecordingTrainer, recorded
from distlenet.task import Task
from distlenet.tasks.registry import make_task
from distlenet.train import train

MOST_TEST_SAMPLES = 500
"""Of each set for evaluation."""


def main() -> None:
    """Check the hooks, or train."""
    parser = settings_parser("distlenet.prove.child", "One process of a proof.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contract", choices=("ascending", "descending"), help="check the hooks; order of listings")
    parser.add_argument("--kill-before", type=int, metavar="STEP")
    arguments = parser.parse_intermixed_args()
    if arguments.contract:
        sort_listings(arguments.contract == "descending")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.contract:
        check_contract(config, arguments.out)
        return
    recorder = Recorder(arguments.out)

    def make_recorded_task(config: Config) -> Task:
        return recorded(make_task(config), recorder, MOST_TEST_SAMPLES)

    train(config, make_recorded_task, partial(RecordingTrainer, recorder, arguments.kill_before))


def check_contract(config: Config, out: Path) -> None:
    """Check the hooks; write the result to ``out``."""
    with init_distributed(config) as context:
        contract = Contract(config, make_task(config), context)
        contract.run()
        result = {
            "findings": contract.findings,
            "fingerprint": contract.fingerprint,
            "mixes_in_training": contract.mixes_in_training,
            "precision": context.precision,
        }
    (out / CONTRACT).write_text(json.dumps(result))


if __name__ == "__main__":
    run_entry(main)
