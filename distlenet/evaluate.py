"""``python -m distlenet.evaluate checkpoint=RUN_OR_FILE``: measure a checkpoint on its test set."""

from distlenet.orphan import die_with_agent

if __name__ == "__main__":
    die_with_agent()  # before the imports that take seconds

from pathlib import Path

from distlenet.checkpoint.file import State, load_checkpoint, load_model
from distlenet.checkpoint.folder import find_checkpoint
from distlenet.config import load_config
from distlenet.data.augment import Prepare, measure
from distlenet.data.loader import Loader
from distlenet.data.sampler import ShardSampler
from distlenet.data.sources import have_data, load_on_node
from distlenet.distributed import from_rank_0
from distlenet.entry import parse_arguments, run_entry
from distlenet.errors import UserError, warn
from distlenet.metrics import EVAL_BATCH, Metrics, evaluate
from distlenet.net import make_net
from distlenet.schema import Config
from distlenet.session import open_session
from distlenet.tracking.lines import accuracy_line


def main() -> None:
    """Evaluate as the arguments say; the settings are the checkpoint's own where nothing else is given."""
    files, overrides = parse_arguments("distlenet.evaluate", "Measure a checkpoint on the test set.")
    # checkpoint=PATH is the short form of checkpoint.path=PATH
    overrides = [f"checkpoint.path={o.partition('=')[2]}" if o.startswith("checkpoint=") else o for o in overrides]
    given = load_config(files, overrides)
    if given.checkpoint.path is None:
        raise UserError("checkpoint: none is given; add checkpoint=RUN_FOLDER or checkpoint=FILE.pt")
    path = find_checkpoint(Path(given.checkpoint.path))
    state = load_checkpoint(path)
    config = load_config(files, overrides, base=state["config"])
    if config.data.name != (trained_on := state["config"]["data"]["name"]):
        warn(f"data.name={config.data.name}: the checkpoint was trained on {trained_on}, so its accuracy says little")
    if given.data.root == Config().data.root:  # the checkpoint's place is read from, but nothing is written there
        if config.data.name == "synthetic":
            config = load_config(files, [*overrides, f"data.root={given.data.root}"], base=state["config"])
        have_data(config.data)
    evaluate_checkpoint(config, state, path)


def evaluate_checkpoint(config: Config, state: State, path: Path) -> Metrics:
    """Measure the checkpoint ``state``, read from ``path``, as one rank; rank 0 prints."""
    with open_session(config) as session:
        world, device = session.world, session.device
        path, state = from_rank_0((path, state))  # in a run under way, ranks may have found different ones
        net = make_net(config.model.name, config.model.channels_last, device)
        load_model(net, state, path)
        data = load_on_node(config.data, world)
        shard = ShardSampler(len(data.test), EVAL_BATCH, world.rank, world.world_size)
        loader = Loader(data.test, shard, 0, device)
        prepare = Prepare(*measure(data.train.images))

        def going_on(batch: int) -> bool:
            session.watchdog.beat(batch)
            return False

        metrics = evaluate(net, loader, prepare, session.autocast(), device, len(data.test), going_on)
        assert metrics is not None, "nothing stops it"
        if world.rank == 0:
            print(f"{path}: step {state['step']}, test loss {metrics.loss:.6f}, accuracy {metrics.accuracy:.4f}")
            print(accuracy_line(metrics.accuracy, metrics.count), flush=True)
    return metrics


if __name__ == "__main__":
    run_entry(main)
