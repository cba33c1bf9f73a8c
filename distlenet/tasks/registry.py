"""Tasks by the name that ``task.name`` accepts."""

from collections.abc import Callable

from distlenet.config.names import accepts_positional, call, resolve
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
    maker, given = resolve("task.name", config.task.name, TASKS), f"task.name={config.task.name}"
    _check_maker(maker, given)
    if missing := ", ".join(sorted(getattr(maker, "__abstractmethods__", ()))):
        raise UserError(f"{given}: does not define {missing}; add each of these methods")
    return _checked(call("task.args", maker, config.task.args, config), given)


def create_task(maker: MakeTask, config: Config) -> Task:
    """Create a task: a class also receives ``task.args``. A collective. Raise UserError if it does not accept them."""
    if maker is make_task:
        return make_task(config)
    given = getattr(maker, "__qualname__", str(maker))
    if not isinstance(maker, type):
        return _checked(maker(config), given)
    _check_maker(maker, given)
    return _checked(call("task.args", maker, config.task.args, config), given)


def _check_maker(maker: MakeTask, given: str) -> None:
    if isinstance(maker, type) and not issubclass(maker, Task):
        raise UserError(f"{given}: is not a subclass of distlenet.Task")
    if not accepts_positional(maker):
        prefix = "__init__ " if isinstance(maker, type) else ""
        raise UserError(f"{given}: {prefix}must accept config as its first argument")


def _checked(task: object, given: str) -> Task:
    """Return a task that has been created. Raise UserError if it cannot be used."""
    if not isinstance(task, Task):
        raise UserError(f"{given}: returned a {type(task).__name__}; expected a distlenet.Task")
    if not hasattr(task, "config"):
        raise UserError(f"{given}: has no config; call super().__init__(config) in {type(task).__name__}.__init__")
    return task


def reads_images(config: Config, maker: MakeTask = make_task) -> bool:
    """Return whether the task that ``maker`` creates loads the images that ``config.data`` names."""
    function = resolve("task.name", config.task.name, TASKS) if maker is make_task else maker
    return isinstance(function, type) and issubclass(function, ImageClassification)
