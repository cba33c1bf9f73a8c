"""Tasks by the name that ``task.name`` accepts."""

from collections.abc import Callable

from distlenet.config.names import call, resolve
from distlenet.config.schema import Config
from distlenet.task import Task
from distlenet.tasks.image_classification import ImageClassification
from distlenet.utils.errors import UserError

MakeTask = Callable[..., Task]
"""The class of a task, or a function of the settings that returns a task."""

TASKS: dict[str, Callable[..., Task]] = {"image_classification": ImageClassification}


def make_task(config: Config) -> Task:
    """Create the task that ``task.name`` names. A collective.

    Raise UserError if the name cannot be imported, does not accept ``task.args`` or is not a complete task.
    """
    maker = resolve("task.name", config.task.name, TASKS)
    if missing := ", ".join(sorted(getattr(maker, "__abstractmethods__", ()))):
        raise UserError(f"task.name={config.task.name}: does not define {missing}; add each of these methods")
    task = call("task.args", maker, config.task.args, config)
    if not isinstance(task, Task):
        raise UserError(f"task.name={config.task.name}: returned a {type(task).__name__}; expected a distlenet.Task")
    return task


def create_task(maker: MakeTask, config: Config) -> Task:
    """Create a task: a class also receives ``task.args``. A collective. Raise UserError if it does not accept them."""
    if not isinstance(maker, type):
        return maker(config)
    task: Task = call("task.args", maker, config.task.args, config)
    return task


def reads_images(config: Config, maker: MakeTask = make_task) -> bool:
    """Return whether the task that ``maker`` creates loads the images that ``config.data`` names."""
    function = resolve("task.name", config.task.name, TASKS) if maker is make_task else maker
    return isinstance(function, type) and issubclass(function, ImageClassification)
