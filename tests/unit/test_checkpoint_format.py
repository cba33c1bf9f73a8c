import hashlib
import io
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_states import lenet_state, tiny_state
from conftest import REPO, run_command

from distlenet.checkpoint.archive import count_bytes, write_state
from distlenet.checkpoint.format import load_checkpoint, load_model, write_atomically
from distlenet.models.lenet import Net
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_the_tutorials_code_loads_a_checkpoint(tmp_path):
    saved, loaded = Net(), Net()
    write_atomically(lenet_state(1, model=saved), tmp_path / "c.pt")
    loaded.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)["model"])
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))


def test_a_checkpoint_is_a_valid_zip_archive(tmp_path):
    write_atomically(tiny_state(1), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    assert torch.load(tmp_path / "c.pt", weights_only=True, mmap=True)["step"] == 1


def test_the_file_is_the_output_of_torch_save_with_a_comment(tmp_path):
    """Older versions load the files of this one, and the other way round."""
    state, buffer = lenet_state(1), io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getvalue()[:-2] + (71).to_bytes(2, "little")
    write_atomically(state, tmp_path / "c.pt")
    content = (tmp_path / "c.pt").read_bytes()
    assert content == archive + b"sha256:" + hashlib.sha256(archive).hexdigest().encode()
    assert count_bytes(state) == len(content)


@pytest.mark.parametrize("room", [0, 100, 150_000, -700, -72, -71, -1])
def test_an_error_of_any_write_is_raised(room):
    """``torch.save`` itself hides it; a negative ``room`` counts from the end of the file."""
    state = lenet_state(1)

    class FullDisk:
        left = room if room >= 0 else count_bytes(state) + room

        def write(self, part):
            self.left -= len(part)
            if self.left < 0:
                raise OSError(28, "No space left on device")

    disk = FullDisk()
    with pytest.raises(OSError, match="No space left on device"):
        write_state(state, disk)
    assert disk.left < 0


@pytest.mark.parametrize("end", [b"x" * 22, b"PK\5\6" + b"x" * 30, b"PK\5\6" + b"x" * 90])
def test_another_format_of_torch_save_is_an_error_at_the_save(monkeypatch, end):
    monkeypatch.setattr("torch.save", lambda _, file: file.write(memoryview(end)))
    with pytest.raises(RuntimeError, match="does not write the end of the archive alone"):
        write_state({}, io.BytesIO())


PEAKS = """
import json, re, sys
from pathlib import Path
import torch
from checkpoint_states import tiny_state
from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore

def peak_bytes(function, *arguments):  # by how much the memory of this process rose while the function ran
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present size
    before = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    function(*arguments)
    after = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    return 1024 * (int(after) - int(before))

def reserve():
    store.reserve(state)
    store.wait()

def save():
    store.save(state)
    assert store.wait() is None

state = {**tiny_state(1), "more": [torch.ones(2_500_000) for _ in range(4)]}
store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
peaks = [peak_bytes(reserve), peak_bytes(save), peak_bytes(save)]
peaks.append(peak_bytes(load_checkpoint, store.directory / "last.pt"))
print(json.dumps(peaks))
"""


def test_saving_and_loading_need_memory_for_one_copy_of_the_state(tmp_path):
    """The allowance of 5 MB is for small objects and the counters of the kernel; the state has 40 MB.

    In a new process: in that of a test that has trained, malloc keeps freed memory, which a copy does not add to.
    """
    env = {"PYTHONPATH": f"{REPO / 'tests'}:{REPO}"}
    ended = run_command(sys.executable, "-c", PEAKS, tmp_path, env=env).succeeded()
    reserve, first, second, load = json.loads(ended.stdout)
    assert 39e6 < reserve < 45e6
    assert first < 5e6  # in the reserved memory
    assert second < 5e6  # in the memory of the first copy
    assert load < 45e6


def test_checkpoints_have_the_permissions_of_the_umask(tmp_path):
    program = "import pathlib; from distlenet.checkpoint.format import *; write_atomically({}, pathlib.Path('c.pt'))"
    run_command("sh", "-c", f'umask 027; exec "$0" -c "{program}"', sys.executable, cwd=tmp_path).succeeded()
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o640


def test_an_archive_without_a_checksum_is_refused(tmp_path):
    torch.save(tiny_state(1), tmp_path / "c.pt")
    with pytest.raises(UserError, match="do not match its checksum"):
        load_checkpoint(tmp_path / "c.pt")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically({**tiny_state(1), "model": Payload()}, Path("malicious.pt"))
    with pytest.raises(UserError, match=r"torch\.load refuses it"):
        load_checkpoint(Path("malicious.pt"))
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"root:x:0:0", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": {"conv1.weight": 3}},
        {"model": {1: torch.zeros(1)}},
        {"ema": None},
        {"ema": {"conv1.weight": 3}},
        {"config": [1]},
        {"config": None},
        {"step": "x"},
        {"step": -5},
        {"epoch": 1.5},
    ],
)
def test_a_state_of_another_structure_is_refused(tmp_path, change):
    write_atomically({**tiny_state(1), **change}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="is not one of distlenet"):
        load_checkpoint(tmp_path / "c.pt")


def test_another_architecture_is_refused_with_the_differences(tmp_path):
    other = Net()
    other.fc3 = torch.nn.Linear(84, 100)
    del other.conv1
    other.extra = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(UserError) as error:
        load_model(Net(), lenet_state(1, model=other), tmp_path / "c.pt")
    message = str(error.value)
    assert "\n" not in message
    for part in ("c.pt: is of another architecture than Net", "conv1.bias", "extra.weight"):
        assert part in message
    assert re.search(r"fc3\.weight: .*\[100, 84\].*\[10, 84\]", message)
