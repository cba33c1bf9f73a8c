"""``python -m distlenet.evaluate checkpoint=RUN_OR_FILE``: evaluate a checkpoint on its test set."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

from collections.abc import Iterator
from pathlib import Path

from distlenet.checkpoint.format import State, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import parse_arguments
from distlenet.config.fields import flatten
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.data.loader import EvaluationLoader
from distlenet.data.sources import require_local_data
from distlenet.distributed.collectives import broadcast_object
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.task import Batch
from distlenet.tasks.registry import make_task, reads_images
from distlenet.tracking.text import accuracy_line
from distlenet.training.evaluation import evaluate
from distlenet.training.meter import Metrics
from distlenet.training.outline import outline_of
from distlenet.utils.errors import UserError, warn


def main() -> None:
    """Evaluate a checkpoint; settings that are not given are taken from it."""
    files, overrides = parse_arguments("distlenet.evaluate", "Evaluate a checkpoint on the test set.")
    # checkpoint=PATH is the short form of checkpoint.path=PATH
    overrides = [f"checkpoint.path={o.partition('=')[2]}" if o.startswith("checkpoint=") else o for o in overrides]
    given = load_config(files, overrides)
    if given.checkpoint.path is None:
        raise UserError("checkpoint: none is given; add checkpoint=RUN_DIRECTORY or checkpoint=FILE.pt")
    path = find_checkpoint(Path(given.checkpoint.path))
    state = load_checkpoint(path)
    names = ["task.name", "model.name", "data.name"]
    config = load_config(files, overrides, state["config"], names)
    trained_on = dict(flatten(state["config"])).get("data.name")
    if config.data.name != trained_on:
        warn(f"data.name={config.data.name}: the checkpoint was trained on {trained_on}, so its accuracy means little")
    if reads_images(config) and given.data.root == Config().data.root:
        # The checkpoint's data.root is read, but nothing is written there.
        if config.data.name == "synthetic":
            config = load_config(files, [*overrides, f"data.root={given.data.root}"], state["config"], names)
        require_local_data(config.data)
    evaluate_checkpoint(config, state, path)


def evaluate_checkpoint(config: Config, state: State, path: Path) -> Metrics:
    """Evaluate the checkpoint ``state``, read from ``path``, as one rank; rank 0 prints."""
    with init_distributed(config) as context:
        env = context.env
        path, state = broadcast_object((path, state))  # during a run, ranks may have found different ones
        task = make_task(config)
        model = task.model().to(context.device)
        load_model(model, state, path)
        test = task.datasets().test
        chunk, collate, seed = task.eval_batch_size, task.collate, config.seed
        loader = EvaluationLoader(test, chunk, env.rank, env.world_size, context.device, collate, seed)

        def batches() -> Iterator[Batch]:
            for batch in loader:
                context.watchdog.heartbeat(batch.number)
                yield batch

        sample = next(iter(EvaluationLoader(test, 1, 0, 1, context.device, collate, seed)))
        outline = outline_of(task, model, task.transform(sample.data, None), context.autocast())
        metrics = evaluate(outline, model, batches(), len(test), context)
        if env.rank == 0:
            loss, accuracy = metrics.means["loss"], metrics.means["accuracy"]
            print(f"{path}: step {state['step']}, test loss {loss:.6f}, accuracy {accuracy:.4f}")
            print(accuracy_line(accuracy, metrics.count), flush=True)
    return metrics


if __name__ == "__main__":
    run_entry(main)
