import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import LIMIT_S

from distlenet.config.loading import load_config
from distlenet.data.sources import opening
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.mapped_file import FileRef, create_shared, open_shared

pytestmark = pytest.mark.unit

READER = """
import sys
from distlenet.utils.mapped_file import FileRef
mapped = FileRef(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).map()
mapped[0] += 1  # private
print(mapped.tolist())
print("ready", flush=True)
sys.stdin.readline()
print(mapped.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_mapping_in_another_process_outlives_the_file(tmp_path, kind):
    (tmp_path / "file").write_bytes(bytes((5, 6, 7)))
    with closing(create_shared([b"\5\6", b"\7"]) if kind == "memory" else open_shared(tmp_path / "file")) as file:
        words = (sys.executable, "-c", READER, file.ref.path, str(file.ref.device), str(file.ref.inode))
        reader = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert [reader.stdout.readline() for _ in range(2)] == ["[6, 6, 7]\n", "ready\n"]
        assert file.ref.map().tolist() == [5, 6, 7]
    assert reader.communicate("\n", timeout=LIMIT_S)[0] == "[6, 6, 7]\n"  # after the file is closed


def test_another_file_at_the_path_is_not_mapped():
    """In another process namespace, the path may lead to any file."""
    with closing(create_shared([b"right"])) as right, closing(create_shared([b"other"])) as other:
        wrong = FileRef(other.ref.path, right.ref.device, right.ref.inode)
        with pytest.raises(FileNotFoundError, match="another file"):
            wrong.map()


def test_a_failed_mapping_raises_an_oserror(monkeypatch):
    def no_memory(*_: object, **__: object):
        raise RuntimeError("unable to mmap 3 bytes from file </proc/1/fd/2>:\\n Cannot allocate memory (12)")

    with closing(create_shared([b"abc"])) as file:
        monkeypatch.setattr(torch, "from_file", no_memory)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            file.ref.map(shared=True)


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    """The kernel's heuristic refuses a private mapping of more than memory and swap, unless it need not be reserved."""
    path, size = tmp_path / "sparse", 2 * psutil.virtual_memory().total + psutil.swap_memory().total
    with open(path, "wb") as file:
        file.truncate(size)
    with closing(open_shared(path)) as shared:
        mapped = shared.ref.map()
        assert len(mapped) == size
        assert mapped[-1] == 0


def test_a_rank_that_cannot_map_the_images_loads_a_copy_and_warns(monkeypatch, capfd, group):
    def broadcast(value, _):
        gone = replace(value.train.images, file=FileRef("/proc/1/fd/999999", 0, 0))
        return replace(value, train=replace(value.train, images=gone))

    monkeypatch.setattr(opening, "broadcast_from_local_rank_0", broadcast)
    data = opening.load_on_node(load_config([], ["data.name=digits"]).data, DistributedEnvironment())
    assert len(data.train) == 1437
    assert "rank 0: cannot map the images that local rank 0 has opened" in capfd.readouterr().err
