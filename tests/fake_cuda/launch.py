"""Run a program on the fake: ``-m fake_cuda.launch [--no-numbers] -m MODULE WORD...`` or ``... FILE WORD...``."""

import runpy
import sys
import warnings

from fake_cuda import mode, substitutes


def main() -> None:
    """Let operators compute, unless --no-numbers is given, and run the program as the main module."""
    words = sys.argv[1:]
    if words[0] == "--no-numbers":
        substitutes.register()
        words = words[1:]
    else:
        mode.install()
    if words[0] == "-m":
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # a warm process has imported it
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
