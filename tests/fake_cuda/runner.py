"""Commands on the fake runtime."""

import os
import sys
from pathlib import Path

from conftest import LIMIT_S, REPO, CommandResult, run_command
from forked import CONTEXT, run_python, run_ranks

from fake_cuda.build import library

TESTS = Path(__file__).parent.parent
CONTEXT.set_forkserver_preload(["torch._dynamo", "pytest", "distlenet.train", "fake_cuda.mode"])


def environment() -> dict[str, str]:
    """Return what a process needs besides its environment so that PyTorch finds the fake runtime, and this package."""
    paths = [str(REPO), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {"LD_PRELOAD": str(library()), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(
    *words: object,
    ranks: int = 1,
    timeout: float = LIMIT_S,
    compute: bool = True,
    torchrun: bool = False,
    cwd: Path = REPO,
    **env: str,
) -> CommandResult:
    """Run ``-m MODULE WORD...`` or ``FILE WORD...`` on the fake.

    Each rank has a GPU, unless FAKE_CUDA_DEVICES is given. Without ``compute``, numbers are not computed. With
    ``torchrun``, the processes are new ones under torchrun, else forked from a warm one.
    """
    command = ("-m", "fake_cuda.launch", *(() if compute else ("--no-numbers",)), *words)
    gpus = env.get("FAKE_CUDA_DEVICES", str(ranks))
    visible = ",".join(map(str, range(int(gpus))))  # the tests' own processes see none
    settings = {"FAKE_CUDA_DEVICES": gpus, "CUDA_VISIBLE_DEVICES": visible, **env}
    if torchrun:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        return run_command(sys.executable, *launcher, *command, timeout=timeout, env=settings, cwd=cwd)
    if ranks > 1:
        return run_ranks(ranks, *command, timeout=timeout, env=settings, cwd=cwd)
    return run_python(*command, timeout=timeout, env=settings, cwd=cwd)
