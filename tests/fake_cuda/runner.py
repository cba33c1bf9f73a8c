"""Commands on the fake runtime."""

import os
import sys
from pathlib import Path

from conftest import REPO, CommandResult, run_command

from fake_cuda.build import library

TESTS = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
    """Return what a process needs besides its environment so that PyTorch finds the fake runtime and all its GPUs."""
    paths = [str(REPO), str(TESTS), os.environ.get("PYTHONPATH", "")]
    gpus = ",".join(map(str, range(int(more.get("FAKE_CUDA_DEVICES", 1)))))  # other tests see none
    preload = {"LD_PRELOAD": str(library()), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**preload, "CUDA_VISIBLE_DEVICES": gpus, **more}


def run(*words: object, ranks: int = 1, timeout: float = 60, compute: bool = True, **env: str) -> CommandResult:
    """Run ``-m MODULE WORD...`` or ``FILE WORD...`` on the fake, under torchrun if there are several ranks.

    Each rank has a GPU, unless FAKE_CUDA_DEVICES is given. Without ``compute``, numbers are not computed.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    fake = ("-m", "fake_cuda.launch") if compute else ()
    settings = {"FAKE_CUDA_DEVICES": str(ranks), **env}
    return run_command(sys.executable, *launcher, *fake, *words, timeout=timeout, env=environment(**settings))
