"""``python -m distlenet.train``, alone or under torchrun or srun: compose a run, train, tear down."""

import time
from pathlib import Path

from distlenet.checkpoint import find_checkpoint
from distlenet.config import load_config, run_folder, to_yaml
from distlenet.data.sources import load_data
from distlenet.distributed import all_or_none
from distlenet.entry import parse_arguments, run_entry
from distlenet.errors import UserError
from distlenet.reduction import micro_batch_size
from distlenet.schema import Config
from distlenet.session import open_session
from distlenet.tracking import Record, Trackers
from distlenet.tracking.console import make_console
from distlenet.tracking.history import History, replace_text
from distlenet.trainer import Trainer


def main() -> None:
    """Train as the arguments say."""
    files, overrides = parse_arguments("distlenet.train", "Train the network, on this process's share of the data.")
    train(load_config(files, overrides))


def train(config: Config) -> Record:
    """Train one run as one rank, and return its summary.

    Raises UserError for everything that the user can mend, where possible before the ranks meet.
    """
    started = time.perf_counter()
    if config.checkpoint.path is not None:
        raise UserError("checkpoint.path is read by distlenet.evaluate; to train on from a file give checkpoint.resume")
    folder = run_folder(config)
    with open_session(config) as session:
        rank_0 = session.world.rank == 0
        micro_batch_size(config, session.world.world_size)  # before the data: it is what users get wrong most
        with all_or_none():
            if rank_0 and config.checkpoint.resume not in ("auto", "never"):
                find_checkpoint(Path(config.checkpoint.resume))
            data = load_data(config.data)
        with all_or_none():
            if rank_0:
                prepare_folder(folder, config)
        tracker = Trackers([make_console(config.run.console), History(folder)] if rank_0 else [])
        try:
            summary = Trainer(config, session, data, folder, tracker).fit()
            summary |= {"wall_s": time.perf_counter() - started, "folder": str(folder)}
            tracker.finish(summary)
        finally:
            tracker.close()
    return summary


def prepare_folder(folder: Path, config: Config) -> None:
    """Make the run folder, with the resolved settings. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(
            f"run folder {folder}: cannot be written: {error.strerror or error}; give another run.dir"
        ) from error


if __name__ == "__main__":
    run_entry(main)
