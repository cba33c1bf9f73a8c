"""Whether all hosts of a job see the run directory."""

import pytest
from forked import run_ranks

pytestmark = pytest.mark.ranks

PROGRAM = """
import sys
from pathlib import Path
import torch.distributed as dist
from distlenet.distributed.shared_directory import hosts_without

dist.init_process_group("gloo")
rank = dist.get_rank()
shared, separate = Path(sys.argv[1]), Path(sys.argv[1], str(min(rank, 1)))
print(rank, hosts_without(shared, rank, ["a", "b", "b"]), hosts_without(separate, rank, ["a", "b", "b"]))
print(rank, "one host:", hosts_without(separate, rank, ["a", "a", "a"]))
dist.destroy_process_group()
"""


def test_hosts_that_do_not_see_the_directory_of_rank_0(tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    lines = run_ranks(3, script, tmp_path, timeout=60).succeeded().stdout.splitlines()
    assert sorted(lines) == [
        "0 [] ['b']",
        "0 one host: []",
        "1 [] []",
        "1 one host: []",
        "2 [] []",
        "2 one host: []",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "program.py"]
