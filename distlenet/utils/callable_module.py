"""Modules that can be called: ``from distlenet import train`` gives the module, and ``train(config)`` trains."""

import sys
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that passes a call on to the function of the same name in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(name: str) -> None:
    """Make the imported module ``name`` callable."""
    sys.modules[name].__class__ = CallableModule
