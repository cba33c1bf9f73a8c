import sys

import pytest
from conftest import run_command

pytestmark = pytest.mark.unit

PAGE_FAULTS = """
import resource, sys, torch
from distlenet.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(2**20).sum()  # 4 MiB
before = faults()
for _ in range(50):
    torch.zeros(2**20).sum()
print(faults() - before)
"""


def test_freed_memory_is_used_again():
    """Zeros of 4 MiB touch 1,024 pages; given back each time, each of 50 rounds faults them in anew.

    Where the kernel hands out huge pages of 2 MiB, that is 2 faults a round.
    """
    kept, given_back = (
        int(run_command(sys.executable, "-c", PAGE_FAULTS, mode).succeeded().stdout) for mode in ("keep", "default")
    )
    assert given_back >= 50
    assert kept < given_back / 10
