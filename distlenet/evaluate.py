"""``python -m distlenet.evaluate checkpoint=RUN_OR_FILE``: measure a checkpoint on its test set."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

from pathlib import Path

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import parse_arguments
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.data.loader import Loader
from distlenet.data.sampler import ShardSampler
from distlenet.data.sources import load_on_node, require_local_data
from distlenet.data.transforms import Prepare, measure
from distlenet.distributed.collectives import broadcast_object
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.models.registry import make_model
from distlenet.tracking.text import accuracy_line
from distlenet.training.evaluation import EVAL_BATCH, evaluate
from distlenet.training.meter import Metrics
from distlenet.utils.errors import UserError, warn


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
        require_local_data(config.data)
    evaluate_checkpoint(config, state, path)


def evaluate_checkpoint(config: Config, state: State, path: Path) -> Metrics:
    """Measure the checkpoint ``state``, read from ``path``, as one rank; rank 0 prints."""
    with init_distributed(config) as context:
        env, device = context.env, context.device
        path, state = broadcast_object((path, state))  # in a run under way, ranks may have found different ones
        net = make_model(config.model.name, config.model.channels_last, device)
        load_model(net, state, path)
        data = load_on_node(config.data, env)
        shard = ShardSampler(len(data.test), EVAL_BATCH, env.rank, env.world_size)
        loader = Loader(data.test, shard, 0, device)
        prepare = Prepare(*measure(data.train.images))

        def going_on(batch: int) -> bool:
            context.watchdog.heartbeat(batch)
            return False

        metrics = evaluate(net, loader, prepare, context.autocast(), device, len(data.test), going_on)
        assert metrics is not None, "nothing stops it"
        if env.rank == 0:
            print(f"{path}: step {state['step']}, test loss {metrics.loss:.6f}, accuracy {metrics.accuracy:.4f}")
            print(accuracy_line(metrics.accuracy, metrics.count), flush=True)
    return metrics


if __name__ == "__main__":
    run_entry(main)
