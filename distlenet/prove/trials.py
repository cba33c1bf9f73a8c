"""The runs of a proof: on several numbers of ranks, with workers, killed and resumed."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from distlenet.config.schema import Config
from distlenet.prove.processes import ProcessFailed, start

RUN_SETTINGS = (
    "run.name=run",
    "run.report=never",
    "wandb.mode=disabled",
    "checkpoint.resume=auto",
    "checkpoint.every_steps=1",
    "train.log_every=1",
    "train.check_replicas_every=1",
    "train.cuda_graph=off",
)
"""Settings of all processes of a proof, in addition to the user's."""


@dataclass(frozen=True)
class Run:
    """One run, in a separate directory."""

    name: str
    ranks: tuple[int, ...]  # of each start; all starts but the last are killed
    workers: int = 0
    kills: tuple[int, ...] = ()  # the step before which each of them is killed

    def execute(self, words: list[str], directory: Path) -> None:
        """Train, also after each kill. Raise ProcessFailed if a rank fails, UserError if it reports one."""
        words = [*words, f"run.dir={directory}", f"data.num_workers={self.workers}"]
        for number, ranks in enumerate(self.ranks):
            kill = [f"--kill-before={self.kills[number]}"] if number < len(self.kills) else []
            with start(directory, [*kill, *words], ranks) as job:
                job.wait(killed=bool(kill))


def settings_of_runs(config: Config, ranks: list[int], steps: int) -> list[str]:
    """Return the settings that make a run short and record everything."""
    settings = [*RUN_SETTINGS, f"train.max_steps={steps}"]
    if (config.optim.warmup_steps or 0) >= steps:
        settings.append(f"optim.warmup_steps={steps // 2}")
    if config.device == "auto" and torch.cuda.device_count() < max(ranks):
        settings.append("device=cpu")
    return settings


def plan(ranks: list[int], steps: int, exact: bool) -> list[Run]:
    """Return all runs; the first is the reference.

    With ``exact`` the killed run resumes on the other numbers of ranks, otherwise on the same number.
    """
    first, other = ranks[0], ranks[1] if len(ranks) > 1 else ranks[0]
    starts = (*ranks[: steps - 1], first) if exact else (other,) * 3
    if len(starts) < 3:
        starts = (first,) * 3
    kills = tuple(max(1, steps * number // len(starts)) for number in range(1, len(starts)))
    return [
        *(Run(count_text(count, "rank"), (count,)) for count in ranks),
        Run(f"{count_text(first, 'rank')}, 2 workers", (first,), workers=2),
        Run(f"{'→'.join(map(str, dict.fromkeys(starts)))} ranks, killed before step {kills}", starts, kills=kills),
    ]


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'s' * (count != 1)}"


def check_ledger(run_dir: Path) -> None:
    """Check that each epoch of a run used each sample once. Raise ProcessFailed if not."""
    command = [sys.executable, "-m", "distlenet.ledger", str(run_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ProcessFailed(f"distlenet.ledger: {ended.stdout}{ended.stderr}")
