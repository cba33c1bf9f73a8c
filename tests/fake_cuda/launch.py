"""Run a program on the fake: ``python -m fake_cuda.launch -m MODULE WORD...`` or ``... FILE WORD...``."""

import runpy
import sys
import warnings

from fake_cuda.mode import install


def main() -> None:
    """Install the mode and run the program as the main module."""
    install()
    words = sys.argv[1:]
    if words[0] == "-m":
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # a warm process has imported it
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
