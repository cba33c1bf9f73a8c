"""With this directory in PYTHONPATH, each Python process computes on the fake from its import of torch on."""

import importlib.abc
import importlib.machinery
import sys


class AfterTorch(importlib.abc.MetaPathFinder):
    """Install the mode when the import of torch is complete."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_install(module):
            execute(module)
            from fake_cuda.mode import install

            install()

        spec.loader.exec_module = execute_and_install
        return spec


sys.meta_path.insert(0, AfterTorch())
