import subprocess
import sys
from contextlib import closing

import pytest
import torch

from distlenet.config.loading import load_config
from distlenet.data import sources
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.utils.mapped_file import FileRef, create_shared, open_shared

pytestmark = pytest.mark.unit

READER = """
import sys
from distlenet.utils.mapped_file import FileRef
bytes_of_it = FileRef(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).map()
bytes_of_it[0] += 1  # its own affair
print(bytes_of_it.tolist())
print("ready", flush=True)
sys.stdin.readline()
print(bytes_of_it.tolist())
"""


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_another_process_maps_the_same_bytes_and_keeps_them(tmp_path, kind):
    (tmp_path / "file").write_bytes(bytes((5, 6, 7)))
    with closing(create_shared([b"\5\6", b"\7"]) if kind == "memory" else open_shared(tmp_path / "file")) as file:
        words = (sys.executable, "-c", READER, file.ref.path, str(file.ref.device), str(file.ref.inode))
        reader = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert [reader.stdout.readline() for _ in range(2)] == ["[6, 6, 7]\n", "ready\n"]
        assert file.ref.map().tolist() == [5, 6, 7]
    assert reader.communicate("\n", timeout=60)[0] == "[6, 6, 7]\n"  # after it was closed


def test_a_file_that_is_another_is_not_mapped():
    """In another process namespace the path may lead to any file."""
    with closing(create_shared([b"mine"])) as mine, closing(create_shared([b"other"])) as other:
        wrong = FileRef(other.ref.path, mine.ref.device, mine.ref.inode)
        with pytest.raises(FileNotFoundError, match="another file"):
            wrong.map()


def test_no_memory_to_map_with_is_an_oserror(monkeypatch):
    def no_memory(*_: object, **__: object):
        raise RuntimeError("unable to mmap 3 bytes from file </proc/1/fd/2>:\\n Cannot allocate memory (12)")

    with closing(create_shared([b"abc"])) as file:
        monkeypatch.setattr(torch, "from_file", no_memory)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            file.ref.map()


def test_a_rank_that_cannot_map_keeps_a_copy_of_its_own_and_says_so(monkeypatch, capfd):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    config, nowhere = load_config([], ["data.name=digits"]).data, FileRef("/proc/1/fd/999999", 0, 0)
    try:
        monkeypatch.setattr(
            sources,
            "broadcast_from_local_rank_0",
            lambda value, _: value._replace(refs=dict.fromkeys(value.refs, nowhere)),
        )
        data = sources.load_on_node(config, DistributedEnvironment())
    finally:
        torch.distributed.destroy_process_group()
    assert len(data.train) == 1437
    assert "rank 0: cannot map the images that local rank 0 has opened" in capfd.readouterr().err
