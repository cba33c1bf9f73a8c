"""``python -m distlenet.evaluate checkpoint=RUN_OR_FILE``: evaluate a checkpoint on its test or validation set."""

from distlenet.utils.process import exit_with_agent
from distlenet.utils.startup import exit_on_ctrl_c

if __name__ == "__main__":
    exit_with_agent()  # before the imports that take seconds
    exit_on_ctrl_c()

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from distlenet.checkpoint.format import State, evaluation_weights, load_checkpoint, load_model, load_task_state
from distlenet.checkpoint.store import find_checkpoint
from distlenet.config.arguments import settings_parser
from distlenet.config.fields import flatten
from distlenet.config.loading import check_modules, load_config, warn_of_unused_settings
from distlenet.config.schema import Config
from distlenet.data.loader import evaluation_loaders, first_test_batch
from distlenet.data.sources import require_local_data
from distlenet.distributed.collectives import broadcast_object, broadcast_state
from distlenet.distributed.context import init_distributed
from distlenet.distributed.entry_point import run_entry
from distlenet.distributed.environment import read_environment
from distlenet.task import Batch, datasets_of, new_model
from distlenet.tasks.registry import MakeTask, create_task, reads_images
from distlenet.tasks.registry import make_task as make_configured_task
from distlenet.tracking.base import Record
from distlenet.tracking.history import to_json
from distlenet.tracking.text import format_metrics, result_line
from distlenet.training.evaluation import evaluate as evaluate_split
from distlenet.training.meter import Metrics
from distlenet.training.outline import outline_of
from distlenet.utils.callable_module import make_callable
from distlenet.utils.errors import UserError, warn
from distlenet.utils.urls import is_url


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
    checkpoint = load_config(files, overrides).checkpoint.path
    if checkpoint is None:
        raise UserError("checkpoint: none is given; add checkpoint=RUN_DIRECTORY or checkpoint=FILE.pt")
    result = evaluate(checkpoint, overrides, files, arguments.split)
    if read_environment(os.environ).rank == 0:
        if arguments.json:
            print(to_json(result), flush=True)
        else:
            values = {key: value for key, value in result.items() if key.startswith(f"{arguments.split}_")}
            metrics = {key.removeprefix(f"{arguments.split}_"): value for key, value in values.items()}
            found, step = result["checkpoint"], result["step"]
            print(f"{found}: step {step}, {format_metrics(metrics, prefix=arguments.split)}")
            print(result_line(values, arguments.split), flush=True)


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    files: Sequence[str] = (),
    split: str = "test",
    make_task: MakeTask = make_configured_task,
) -> Record:
    """Evaluate a checkpoint file, or the newest one of a run directory, as one rank. A collective, under torchrun.

    The settings are those of the checkpoint, unless ``overrides`` give others; ``files`` give names, and settings that
    do not change the result. The user's code must be named again, or ``make_task`` creates the task. ``split`` is test
    or val. Return ``checkpoint``, the ``url`` if one was given, ``step``, and metrics by name: ``test_loss``,
    ``test_count`` and so on. Raise UserError if the checkpoint does not fit task or data.
    """
    given = load_config(files, overrides)
    path = find_checkpoint(checkpoint)
    state = load_checkpoint(path)
    names = (
        ["task.name", "model.name", "data.name"] if make_task is make_configured_task else ["model.name", "data.name"]
    )
    config = load_config(files, overrides, state["config"], names)
    check_modules(config)
    if read_environment(os.environ).rank == 0:
        warn_of_unused_settings(files, overrides, state["config"])
        name, trained_on = config.data.name, dict(flatten(state["config"])).get("data.name")
        if name != trained_on:
            warn(f"data.name={name}: the checkpoint was trained on {trained_on}, so its accuracy means little")
    if reads_images(config, make_task) and given.data.root == Config().data.root:
        # The checkpoint's data.root is read, but nothing is written there.
        if config.data.name == "synthetic":
            config = load_config(files, [*overrides, f"data.root={given.data.root}"], state["config"], names)
        require_local_data(config.data)
    config = replace(config, data=replace(config.data, build_cache=False))  # it reads a part of the images
    metrics, path, state = _evaluate(config, state, path, split, make_task)
    url = {"url": checkpoint} if is_url(checkpoint) else {}  # the path is of a temporary copy
    return {"checkpoint": str(path), **url, "step": state["step"], **metrics.to_dict(f"{split}_")}


def _evaluate(config: Config, state: State, path: Path, split: str, make_task: MakeTask) -> tuple[Metrics, Path, State]:
    """Return the metrics, and the checkpoint that rank 0 found."""
    with init_distributed(config) as context:
        path = broadcast_object(path)  # during a run, ranks may have found different ones
        state = broadcast_state(state, context.broadcast_device)
        task = create_task(make_task, config)
        datasets = datasets_of(task)
        loaders = evaluation_loaders(config, context, datasets, task)
        if split not in loaders:
            raise UserError("--split val: the run has no validation set; give --split test")
        model = new_model(task).to(context.device)
        load_model(model, evaluation_weights(state), path)  # first: another architecture is the clearer message
        load_task_state(task, state, path)
        loader = loaders[split]

        def batches() -> Iterator[Batch]:
            for batch in loader:
                context.watchdog.heartbeat(batch.number)
                yield batch

        example = first_test_batch(config, context.device, datasets, task).inputs(task)
        outline = outline_of(task, model, example, context.autocast())
        metrics = evaluate_split(outline, model, batches(), loader.samples, context)
    return metrics, path, state


make_callable(__name__)

if __name__ == "__main__":
    run_entry(main)
