"""``distlenet COMMAND ...``, which is the same as ``python -m distlenet.COMMAND ...``."""

import difflib
import runpy
import sys

from distlenet import __version__

COMMANDS = {
    "train": "train a network, alone or under torchrun, srun or mpirun",
    "evaluate": "evaluate a run or a checkpoint",
    "predict": "classify image files",
    "export": "write a trained network for other programs: ONNX, torch.export, safetensors",
    "report": "write a page with the curves of runs",
    "preflight": "check whether a job would start here",
    "prove": "check that a task gives the same bits however it is run",
    "ledger": "check that each epoch used each sample once",
    "data": "locate or download a data set",
    "config": "print the reference of all settings",
    "serve": "answer predictions of an exported model over HTTP",
    "scripts": "write the launch scripts and the batch scripts to a directory",
}

PACKAGES = ("torch", "torchvision", "omegaconf", "filelock", "rich", "yaml", "wandb", "psutil")
"""What a server without PyTorch does not install, and the other commands import."""


def usage() -> str:
    """Return the help text."""
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    head = ["usage: distlenet COMMAND ...", "", "Exact distributed training with PyTorch.", "", "commands:"]
    options = ["", "distlenet COMMAND --help describes a command; distlenet --version prints the version."]
    return "\n".join([*head, *lines, *options])


def main() -> None:
    """Run the command that the first argument names. This module imports no PyTorch, so that help is immediate."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"distlenet {__version__}")
    elif name in COMMANDS:
        del sys.argv[1]
        try:
            runpy.run_module(f"distlenet.{name}", run_name="__main__", alter_sys=True)
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES:
                raise
            print(
                f"distlenet: {name}: the package {error.name} is not installed; pip install distlenet", file=sys.stderr
            )
            sys.exit(2)
    else:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        print(f"distlenet: {name[:100]}: no such command; {hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
