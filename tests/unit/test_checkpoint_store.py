import resource
import signal
import sys
import threading

import pytest
import torch
from checkpoint_states import lenet_state, tiny_state
from conftest import run_command

from distlenet.checkpoint import store as store_module
from distlenet.checkpoint.format import link_atomically, load_checkpoint
from distlenet.checkpoint.host_copy import copy_to_host
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def test_the_newest_k_and_the_best_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    assert store.newest() is None
    for step in (5, 10, 99, 100, 99999999, 123456789):
        store.save(tiny_state(step), best=step == 10)
        assert store.wait() is None
    names = sorted(path.name for path in store.directory.iterdir())
    assert names == ["best.pt", "last.pt", "step-123456789.pt", "step-99999999.pt"]
    assert store.newest().name == "step-123456789.pt"  # by step, not by name
    assert load_checkpoint(store.directory / "best.pt")["step"] == 10
    assert load_checkpoint(store.directory / "last.pt")["step"] == 123456789
    assert (store.directory / "last.pt").samefile(store.newest())  # takes no space


def test_the_last_is_a_copy_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr("os.link", refuse)
    store = CheckpointStore(tmp_path, keep_last=1)
    for step in (1, 2):
        newest = store.write(tiny_state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-00000002.pt"]
    assert (tmp_path / "last.pt").read_bytes() == newest.read_bytes()


def refuse(*_):
    raise OSError(1, "Operation not permitted")


def test_a_link_that_exists_leaves_no_temporary_file(tmp_path):
    path = CheckpointStore(tmp_path, keep_last=1).write(tiny_state(1))
    link_atomically(path, tmp_path / "last.pt")  # os.replace does nothing then
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-00000001.pt"]


def test_the_last_is_repaired_at_a_start(tmp_path):
    """After a kill between the two writes, and if the newest file, which it was, is damaged."""
    store = CheckpointStore(tmp_path, keep_last=3)
    store.repair_last()  # nothing yet
    for step in (1, 2):
        newest = store.write(tiny_state(step))
    last = tmp_path / "last.pt"
    store.repair_last()
    assert last.samefile(newest)
    last.unlink()
    store.repair_last()
    assert last.samefile(newest)
    newest.write_bytes(b"damaged")
    store.load_newest()
    store.repair_last()
    assert load_checkpoint(last)["step"] == 1
    assert not list(tmp_path.glob(".*"))


def test_the_best_is_written_before_the_newest(tmp_path, monkeypatch):
    """The newest contains the best accuracy: if it were written first, a kill would hide that best.pt is missing."""
    written = []
    monkeypatch.setattr(store_module, "write_atomically", lambda _, path: written.append(path.name))
    monkeypatch.setattr(store_module, "link_atomically", lambda _, path: written.append(path.name))
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(tiny_state(5), best=True)
    assert store.wait() is None
    assert written == ["best.pt", "step-00000005.pt", "last.pt"]


def test_a_full_disk_is_reported_and_leaves_the_old_file(tmp_path):
    """The error is that of the kernel, from a limit of the file size; torch.save into a file would hide it."""
    store = CheckpointStore(tmp_path, keep_last=1)
    store.write(lenet_state(1))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        store.save(lenet_state(2), best=True)
        assert "cannot be written: File too large" in store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "step-00000001.pt"]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    store = CheckpointStore(tmp_path, keep_last=1)
    path = store.write(tiny_state(1))
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    store.save(tiny_state(2), best=True)
    assert "cannot be written: No space left on device" in store.wait()
    assert set(tmp_path.iterdir()) == {path, tmp_path / "last.pt"}
    assert path.read_bytes() == (tmp_path / "last.pt").read_bytes() == before


def test_temporary_files_are_no_checkpoints_and_are_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    newest = store.write(tiny_state(1))
    (tmp_path / ".writing-abc").write_bytes(b"half")
    assert store.by_step() == [newest]
    store.remove_temporary_files()
    assert set(tmp_path.iterdir()) == {newest, tmp_path / "last.pt"}


def damaged(content: bytes):
    """Yield every kind of damage: truncated at each percent, one changed byte, empty, zeros, another format."""
    for percent in range(100):
        yield content[: len(content) * percent // 100]
    for position in range(0, len(content), 1 if len(content) < 500 else len(content) // 499):
        yield content[:position] + bytes([content[position] ^ 0x20]) + content[position + 1 :]
    for position in range(len(content) - 80, len(content)):  # the checksum and the end of the archive
        yield content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    yield bytes(len(content))
    yield content + b"more"
    yield b"no archive at all"


def test_the_previous_checkpoint_replaces_a_damaged_newest(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep_last=2)
    older, newest = store.write(tiny_state(1)), store.write(tiny_state(2))
    aside = tmp_path / "step-00000002.pt.corrupt"
    for content in damaged(newest.read_bytes()):
        newest.write_bytes(content)
        path, state = store.load_newest()
        assert (path, state["step"]) == (older, 1)
        assert not newest.exists()
        assert aside.read_bytes() == content
        aside.unlink()
        (warning,) = capsys.readouterr().err.splitlines()
        assert "moved aside to step-00000002.pt.corrupt, resuming from step-00000001.pt" in warning
    newest.mkdir()  # unreadable for root too
    assert store.load_newest()[0] == older
    newest.symlink_to(tmp_path / "nowhere")
    assert store.load_newest()[0] == older
    assert {path.name for path in tmp_path.glob("*.corrupt*")} == {f"{newest.name}.corrupt", f"{newest.name}.corrupt2"}


def test_without_an_undamaged_checkpoint_a_warning_announces_a_start_from_scratch(tmp_path, capsys):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        store.write(tiny_state(step)).write_bytes(b"")
    assert store.load_newest() is None
    assert "no other exists, starting from scratch" in capsys.readouterr().err


KILLED_WHILE_WRITING = """
import builtins, os, signal, sys
from pathlib import Path
import torch
from distlenet.checkpoint.archive import count_bytes
from distlenet.checkpoint.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
state = {"model": dict(torch.nn.Linear(8, 8).state_dict()), "step": 2, "epoch": 0, "config": {}}
cuts = [count_bytes(state) * part // 40 for part in range(41)]
original = builtins.open
for cut in cuts:
    child = os.fork()
    if child == 0:
        def open_until_cut(path, mode):
            opened = original(path, mode)
            class File:
                left = cut
                def __enter__(self): return self
                def __exit__(self, *_): opened.close()
                def write(self, part):
                    opened.write(part[:self.left]); opened.flush()
                    self.left -= len(part)
                    if self.left <= 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            return File()
        builtins.open = open_until_cut
        store.save(state, best=True)
        store.wait()
        os._exit(9)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    path, loaded = store.load_newest()
    assert loaded["step"] == 1 and path.name == "step-00000001.pt", path
    assert list(store.directory.glob("*.corrupt")) == []
assert len(list(store.directory.glob(".writing-*"))) == len(cuts)
store.remove_temporary_files()
print(sorted(path.name for path in store.directory.iterdir()))
"""


@pytest.mark.slow
def test_a_kill_at_any_byte_of_a_write_leaves_the_old_file(tmp_path):
    CheckpointStore(tmp_path, keep_last=1).write(tiny_state(1))
    ended = run_command(sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path)
    assert ended.succeeded().stdout == "['last.pt', 'step-00000001.pt']\n"


def test_save_returns_before_the_write_and_later_training_does_not_change_the_file(tmp_path, monkeypatch):
    proceed, write_atomically = threading.Event(), store_module.write_atomically

    def slow_write(*arguments):
        assert proceed.wait(30)
        write_atomically(*arguments)

    monkeypatch.setattr(store_module, "write_atomically", slow_write)
    store, model = CheckpointStore(tmp_path, keep_last=1), torch.nn.Linear(2, 1)
    expected = model.weight.detach().clone()
    store.save(lenet_state(1, model=model))
    assert store.busy
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        model.weight.fill_(7.0)
    assert store.wait(0.01) == "not done within 0.01 s, see checkpoint.preemption_grace_s"
    proceed.set()
    assert store.wait() is None
    assert torch.equal(load_checkpoint(store.newest())["model"]["weight"], expected)


def test_a_save_waits_for_its_memory_and_is_not_left_out(tmp_path, monkeypatch):
    proceed, memory_for = threading.Event(), store_module.memory_for

    def slow_allocation(state):
        assert proceed.wait(30)
        return memory_for(state)

    monkeypatch.setattr(store_module, "memory_for", slow_allocation)
    store = CheckpointStore(tmp_path, keep_last=1)
    store.reserve(tiny_state(1))
    assert not store.busy  # else the manager would leave out a save within an epoch
    assert store.wait(0.01) == "not done within 0.01 s, see checkpoint.preemption_grace_s"
    proceed.set()
    store.save(tiny_state(1))
    assert store.wait() is None
    assert store.newest().name == "step-00000001.pt"


def test_failed_writes_are_reported_once_and_the_next_one_succeeds(tmp_path, capsys):
    """A file in the place of the directory makes it unwritable for root too."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    (tmp_path / "checkpoints").write_text("not a directory")
    for step in (1, 2):
        store.save(tiny_state(step))
        assert "cannot be written" in store.wait()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.endswith("training continues, and saves again when the next checkpoint is due")
    (tmp_path / "checkpoints").unlink()
    store.save(tiny_state(3))
    assert store.wait() is None
    assert store.newest().name == "step-00000003.pt"


def test_the_next_write_includes_a_best_that_could_not_be_written(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    (tmp_path / "checkpoints").write_text("not a directory")
    store.save(tiny_state(1), best=True)
    store.wait()
    (tmp_path / "checkpoints").unlink()
    store.save(tiny_state(2))
    assert store.wait() is None
    assert load_checkpoint(store.directory / "best.pt")["step"] == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_copy_reuses_the_memory_of_the_previous_one():
    """Also if the states differ in part: what does not fit is allocated."""
    weights = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    sparse = torch.eye(3).to_sparse()
    first = copy_to_host({"step": 1, "a": weights, "b": torch.zeros(3), "s": sparse})
    second = copy_to_host({"step": 2, "a": weights + 1, "b": torch.ones(4), "s": sparse, "n": [torch.ones(3)]}, first)
    assert second["step"] == 2
    assert second["a"] is first["a"]
    assert second["n"][0] is first["b"]
    assert torch.equal(second["a"], weights + 1)
    assert torch.equal(second["n"][0], torch.ones(3))
    assert torch.equal(second["b"], torch.ones(4))
    assert torch.equal(second["s"].to_dense(), torch.eye(3))


def test_no_checkpoint_is_written_if_the_call_before_it_fails(tmp_path):
    def sync_history():
        raise UserError("metrics.jsonl: disk full")

    store = CheckpointStore(tmp_path, keep_last=3)
    store.save(tiny_state(1), before=sync_history)
    assert "metrics.jsonl: disk full" in store.wait()
    assert store.newest() is None


def test_an_unreadable_path_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # unreadable for root too
    for path in (loop, tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="cannot be read"):
            find_checkpoint(path)
    with pytest.raises(UserError, match="cannot be read"):
        CheckpointStore(loop, keep_last=1).newest()


def test_find_checkpoint_accepts_a_file_or_a_run_directory(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match="no such file or directory"):
        find_checkpoint(run_dir)
    run_dir.mkdir()
    with pytest.raises(UserError, match="has no checkpoints"):
        find_checkpoint(run_dir)
    store = CheckpointStore(run_dir / "checkpoints", keep_last=3)
    with pytest.raises(UserError, match=r"no such file.*; best.pt needs a validation set, see data.validation$"):
        find_checkpoint(store.directory / "best.pt")
    store.save(tiny_state(7), best=True)
    assert store.wait() is None
    newest = store.write(tiny_state(8))
    assert find_checkpoint(run_dir) == find_checkpoint(store.directory) == newest
    assert find_checkpoint(store.directory / "best.pt") == store.directory / "best.pt"


def test_best_checkpoint_is_written_later_if_the_disk_is_full_when_it_is_due(tmp_path, capsys):
    def full_disk():
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, keep_last=1)
    best, later = tiny_state(1), tiny_state(2)
    store.save(best, best=True, before=full_disk)
    assert "No space left on device" in str(store.wait())
    store.save(later)  # not in the memory that still holds the best
    assert store.wait() is None
    for name, state in (("best.pt", best), ("last.pt", later)):
        loaded = load_checkpoint(tmp_path / name)
        assert loaded["step"] == state["step"]
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    assert "training continues" in capsys.readouterr().err
