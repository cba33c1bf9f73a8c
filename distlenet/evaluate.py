"""``python -m distlenet.evaluate checkpoint=RUN_OR_FILE``: evaluate a checkpoint on its test or validation set."""

from distlenet.utils.process import exit_with_agent

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds

from collections.abc import Iterator
from pathlib import Path

from distlenet.checkpoint.format import State, evaluation_weights, load_checkpoint, load_model
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import settings_parser
from distlenet.config.fields import flatten
from distlenet.config.loading import load_config
from distlenet.config.schema import Config
from distlenet.data.loader import EvaluationLoader, evaluation_loaders
from distlenet.data.sources import require_local_data
from distlenet.distributed.collectives import broadcast_object
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.task import Batch
from distlenet.tasks.registry import make_task, reads_images
from distlenet.tracking.history import to_json
from distlenet.tracking.text import format_metrics, result_line
from distlenet.training.evaluation import evaluate
from distlenet.training.meter import Metrics
from distlenet.training.outline import outline_of
from distlenet.utils.errors import UserError, warn


def main() -> None:
    """Evaluate a checkpoint; settings that are not given are taken from it."""
    parser = settings_parser("distlenet.evaluate", "Evaluate a checkpoint on the test set or the validation set.")
    parser.add_argument("--split", choices=["test", "val"], default="test", help="the set (test)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object, with the metrics at full precision as in summary.json",
    )
    arguments = parser.parse_intermixed_args()
    files, overrides = arguments.config, arguments.overrides
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
    evaluate_checkpoint(config, state, path, arguments.split, arguments.json)


def evaluate_checkpoint(
    config: Config, state: State, path: Path, split: str = "test", as_json: bool = False
) -> Metrics:
    """Evaluate the checkpoint ``state``, read from ``path``, as one rank; rank 0 prints."""
    with init_distributed(config) as context:
        env = context.env
        path, state = broadcast_object((path, state))  # during a run, ranks may have found different ones
        task = make_task(config)
        model = task.model().to(context.device)
        load_model(model, evaluation_weights(state), path)
        loaders = evaluation_loaders(config, context, datasets := task.datasets(), task)
        if split not in loaders:
            raise UserError("--split val: the data has no validation set; give the data.validation of the training")
        loader = loaders[split]

        def batches() -> Iterator[Batch]:
            for batch in loader:
                context.watchdog.heartbeat(batch.number)
                yield batch

        first = EvaluationLoader(datasets.test, 1, 0, 1, context.device, task.collate, config.seed)
        sample = next(iter(first))
        outline = outline_of(task, model, task.transform(sample.data, None), context.autocast())
        metrics = evaluate(outline, model, batches(), loader.samples, context)
        if env.rank == 0:
            values, step = metrics.to_dict(f"{split}_"), state["step"]
            if as_json:
                print(to_json({"checkpoint": str(path), "step": step, **values}), flush=True)
            else:
                print(f"{path}: step {step}, {format_metrics(metrics.to_dict(), prefix=split)}")
                print(result_line(values, split), flush=True)
    return metrics


if __name__ == "__main__":
    run_entry(main)
