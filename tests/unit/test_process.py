import subprocess
import sys

import pytest
from conftest import LIMIT_S, run_command

pytestmark = pytest.mark.unit

PAGE_FAULTS = """
import resource, sys, torch
from distlenet.utils.process import tune_malloc
torch.set_num_threads(1)
if sys.argv[1] == "tuned":
    tune_malloc()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [torch.ones(2**20) for _ in range(8)]  # 32 MiB of activations, freed together
for _ in range(5):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


@pytest.mark.slow
def test_freed_memory_is_reused():
    """32 MiB are 8,192 pages. If they are returned to the kernel, each of 20 steps faults them in again.

    The environment fixes glibc's initial thresholds, which it otherwise raises at run time, depending on the blocks.
    With huge pages of 2 MiB, a step has 16 faults.
    """
    initial = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    tuned, untuned = (
        int(run_command(sys.executable, "-c", PAGE_FAULTS, mode, env=initial).succeeded().stdout)
        for mode in ("tuned", "default")
    )
    assert untuned >= 20 * 16
    assert tuned < untuned / 10


CHILD = """
import sys
from distlenet.utils.process import exit_with_agent
exit_with_agent({"TORCHELASTIC_RUN_ID": "1"} if sys.argv[1] == "torchrun" else {})
print("ready", flush=True)
sys.stdin.readline()
print("alive", flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@pytest.mark.parametrize(("mode", "output"), [("torchrun", ""), ("shell", "alive\n")])
def test_only_ranks_of_torchrun_exit_with_their_parent(mode, output):
    words = [sys.executable, "-c", PARENT, sys.executable, "-c", CHILD, mode]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        parent.wait()
        assert parent.communicate("\n", timeout=LIMIT_S)[0] == output  # of the child, which has the same pipes


def test_it_imports_only_the_standard_library():
    """Entry points import it before torch, whose import takes seconds."""
    program = (
        "import sys; before = set(sys.modules); import distlenet.utils.process; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run_command(sys.executable, "-c", program).succeeded().stdout.split() == ["distlenet"]
