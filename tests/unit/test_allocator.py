import sys

import pytest
from conftest import run_command

pytestmark = pytest.mark.unit

PAGE_FAULTS = """
import resource, sys, torch
from distlenet.utils.process import tune_malloc
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert tune_malloc()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [torch.ones(2**20) for _ in range(8)]  # 32 MiB of activations, freed together
for _ in range(5):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


def test_freed_memory_is_used_again():
    """32 MiB are 8,192 pages; given back each time, they are faulted in anew in each of 20 steps.

    glibc's first limits, held fast, stand for its usual ones, which it raises now and then, as blocks happen to lie.
    Where the kernel hands out huge pages of 2 MiB, a step has 16 faults.
    """
    first = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    kept, given_back = (
        int(run_command(sys.executable, "-c", PAGE_FAULTS, mode, env=first).succeeded().stdout)
        for mode in ("keep", "default")
    )
    assert given_back >= 20 * 16
    assert kept < given_back / 10
