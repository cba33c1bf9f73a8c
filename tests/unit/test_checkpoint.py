import os
import re
import resource
import signal
import sys
import threading
import zipfile

import pytest
import torch
from conftest import run_command

from distlenet.checkpoint import format as checkpoint
from distlenet.checkpoint import store as checkpoint_folder
from distlenet.checkpoint.compatibility import check_same_settings, choose_resumable
from distlenet.checkpoint.format import load_checkpoint, load_model, write_atomically
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.config.loading import load_config
from distlenet.models.lenet import Net
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit


def state(step: int, *overrides: str, net: torch.nn.Module | None = None):
    model = (net or Net()).state_dict()
    return {"model": model, "step": step, "epoch": 0, "config": load_config([], overrides).to_dict()}


def test_the_newest_k_and_the_best_are_kept(tmp_path):
    folder = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    assert folder.newest() is None
    for step in (5, 10, 99, 100, 1000, 123456789):
        folder.write(state(step), best=step == 10)
    names = sorted(path.name for path in folder.directory.iterdir())
    assert names == ["best.pt", "step-00001000.pt", "step-123456789.pt"]
    assert folder.newest().name == "step-123456789.pt"  # by step, not by name
    assert load_checkpoint(folder.directory / "best.pt")["step"] == 10


def test_the_tutorials_code_reads_a_checkpoint(tmp_path):
    net = Net()
    write_atomically(state(1, net=net), tmp_path / "c.pt")
    fresh = Net()
    fresh.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)["model"])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_a_death_between_the_best_and_the_newest_loses_neither(tmp_path, monkeypatch):
    """The newest says what the best accuracy was: written first, it would hide that best.pt is missing."""
    written = []
    monkeypatch.setattr(checkpoint_folder, "write_atomically", lambda _, path: written.append(path.name))
    CheckpointStore(tmp_path, keep_last=1).write(state(5), best=True)
    assert written == ["best.pt", "step-00000005.pt"]


def test_a_disk_that_is_really_full(tmp_path):
    """The kernel's own error, from a limit on the size of files; torch.save into a file would hide it."""
    folder = CheckpointStore(tmp_path, keep_last=1)
    folder.write(state(1), best=False)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            folder.write(state(2), best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_torn_files_are_no_checkpoints_and_are_removed(tmp_path):
    folder = CheckpointStore(tmp_path, keep_last=3)
    newest = folder.write(state(1), best=False)
    (tmp_path / ".writing-abc").write_bytes(b"half")
    assert list(tmp_path.glob("*.pt")) == [newest]
    folder.remove_temporary_files()
    assert list(tmp_path.iterdir()) == [newest]


@pytest.mark.parametrize("fails_in", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, fails_in):
    folder = CheckpointStore(tmp_path, keep_last=1)
    folder.write(state(1), best=False)
    before = (tmp_path / "step-00000001.pt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    module, name = fails_in.split(".")
    monkeypatch.setattr(getattr(checkpoint, module), name, fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        folder.write(state(2), best=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert (tmp_path / "step-00000001.pt").read_bytes() == before


def test_checkpoints_have_the_usual_permissions(tmp_path):
    program = (
        "import sys, pathlib; from distlenet.checkpoint.format import *; write_atomically({}, pathlib.Path('c.pt'))"
    )
    run_command("sh", "-c", f'umask 027; exec "$0" -c "{program}"', sys.executable, cwd=tmp_path).succeeded()
    assert (tmp_path / "c.pt").stat().st_mode & 0o777 == 0o640


def tiny(step: int) -> dict:
    return state(step, net=torch.nn.Linear(2, 1))


def damaged(content: bytes):
    """Every kind of damage: cut at each percent, one byte changed anywhere, empty, zeros, another format."""
    for percent in range(100):
        yield content[: len(content) * percent // 100]
    for place in range(0, len(content), 1 if len(content) < 500 else len(content) // 499):
        yield content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :]
    for place in range(len(content) - 80, len(content)):  # the checksum itself, and the end of the archive
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    yield bytes(len(content))
    yield content + b"more"
    yield b"no archive at all"


def test_any_damage_to_the_newest_leads_to_the_one_before(tmp_path, capsys):
    folder = CheckpointStore(tmp_path, keep_last=2)
    older, newest = folder.write(tiny(1), best=False), folder.write(tiny(2), best=False)
    content = newest.read_bytes()
    for bad in damaged(content):
        newest.write_bytes(bad)
        path, found = folder.load_newest()
        assert path == older
        assert found["step"] == 1
        assert not newest.exists()
        aside = tmp_path / "step-00000002.pt.corrupt"
        assert aside.read_bytes() == bad
        aside.unlink()
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert "moved aside to step-00000002.pt.corrupt, going on from step-00000001.pt" in told[0]
    newest.mkdir()  # cannot be read, by root neither
    assert folder.load_newest()[0] == older
    newest.symlink_to(tmp_path / "nowhere")
    assert folder.load_newest()[0] == older
    assert {path.name for path in tmp_path.glob("*.corrupt*")} == {f"{newest.name}.corrupt", f"{newest.name}.corrupt2"}


def test_when_all_are_damaged_it_says_so_and_starts_anew(tmp_path, capsys):
    folder = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        folder.write(tiny(step), best=False).write_bytes(b"")
    assert folder.load_newest() is None
    assert "no other is left: starting anew" in capsys.readouterr().err


def test_a_whole_archive_without_a_checksum_is_refused(tmp_path):
    torch.save(tiny(1), tmp_path / "c.pt")
    with pytest.raises(UserError, match="do not match its checksum"):
        load_checkpoint(tmp_path / "c.pt")


def test_a_checkpoint_is_still_an_archive_that_others_read(tmp_path):
    write_atomically(tiny(1), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    assert torch.load(tmp_path / "c.pt", weights_only=True, mmap=True)["step"] == 1


KILLED_WHILE_WRITING = """
import builtins, io, os, signal, sys
from pathlib import Path
import torch
from distlenet.checkpoint import format as file
from distlenet.checkpoint.store import CheckpointStore
folder, cuts = CheckpointStore(Path(sys.argv[1]), keep_last=1), [int(cut) for cut in sys.argv[2:]]
state = {"model": torch.nn.Linear(8, 8).state_dict(), "step": 2, "epoch": 0, "config": {}}
real = os.fdopen
for cut in cuts:
    child = os.fork()
    if child == 0:
        def fdopen(descriptor, mode):
            opened = real(descriptor, mode)
            class Killed:
                def __enter__(self): return self
                def __exit__(self, *_): opened.close()
                def write(self, content):
                    opened.write(content[:cut]); opened.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            return Killed()
        os.fdopen = fdopen
        folder.write(state, best=True)
        os._exit(9)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    path, found = folder.load_newest()
    assert found["step"] == 1 and path.name == "step-00000001.pt", path
    assert list(folder.directory.glob("*.corrupt")) == []
folder.remove_temporary_files()
print(sorted(path.name for path in folder.directory.iterdir()))
"""


def test_a_kill_while_writing_at_any_byte_leaves_the_one_before(tmp_path):
    CheckpointStore(tmp_path, keep_last=1).write(tiny(1), best=False)
    size = len((tmp_path / "step-00000001.pt").read_bytes())
    cuts = [size * part // 40 for part in range(41)]
    words = (sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path, *cuts)
    assert run_command(*words).succeeded().stdout == "['step-00000001.pt']\n"


def test_saving_returns_before_the_file_is_written_and_training_cannot_change_it(tmp_path, monkeypatch):
    go_on, real = threading.Event(), checkpoint_folder.write_atomically

    def slow(*arguments):
        assert go_on.wait(30)
        real(*arguments)

    monkeypatch.setattr(checkpoint_folder, "write_atomically", slow)
    folder, net = CheckpointStore(tmp_path, keep_last=1), torch.nn.Linear(2, 1)
    wanted = net.weight.detach().clone()
    folder.save(state(1, net=net))
    assert folder.busy
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        net.weight.fill_(7.0)
    assert folder.wait(0.01) == "not done within 0.01 s, see checkpoint.preemption_grace_s"
    go_on.set()
    assert folder.wait() is None
    assert torch.equal(load_checkpoint(folder.newest())["model"]["weight"], wanted)


def test_a_failed_write_is_told_once_and_tried_again(tmp_path, capsys):
    """A folder where a file is in the way: unwritable for root, too."""
    folder = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    (tmp_path / "checkpoints").write_text("in the way")
    for step in (1, 2):
        folder.save(tiny(step))
        assert "cannot be written" in folder.wait()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].endswith("training goes on, and saves again when the next checkpoint is due")
    (tmp_path / "checkpoints").unlink()
    folder.save(tiny(3))
    assert folder.wait() is None
    assert folder.newest().name == "step-00000003.pt"


def test_a_best_that_could_not_be_written_is_made_up_for(tmp_path, capsys):
    folder = CheckpointStore(tmp_path / "checkpoints", keep_last=3)
    (tmp_path / "checkpoints").write_text("in the way")
    folder.save(tiny(1), best=True)
    folder.wait()
    (tmp_path / "checkpoints").unlink()
    folder.save(tiny(2))
    assert folder.wait() is None
    assert load_checkpoint(folder.directory / "best.pt")["step"] == 1
    assert "cannot be written" in capsys.readouterr().err


def test_what_must_be_written_before_it_fails_the_checkpoint_too(tmp_path):
    def history():
        raise UserError("metrics.jsonl: disk full")

    folder = CheckpointStore(tmp_path, keep_last=3)
    folder.save(tiny(1), before=history)
    assert "metrics.jsonl: disk full" in folder.wait()
    assert folder.newest() is None


class Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_atomically({"model": Payload(), "step": 1, "epoch": 0, "config": {}}, checkpoint.Path("evil.pt"))
    with pytest.raises(UserError, match=r"torch\.load refuses it"):
        load_checkpoint(checkpoint.Path("evil.pt"))
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"root:x:0:0", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoint_are_named(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 3},
        {"model": {"conv1.weight": 3}},
        {"config": [1]},
        {"config": None},
        {"step": "x"},
        {"step": -5},
        {"epoch": 1.5},
    ],
)
def test_a_file_with_the_right_keys_and_wrong_contents_is_refused(tmp_path, change):
    write_atomically({**state(1), **change}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="is not one of distlenet"):
        load_checkpoint(tmp_path / "c.pt")


def test_what_cannot_be_read_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # unreadable for root too
    for path in (loop, tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="cannot be read"):
            find_checkpoint(path)
    with pytest.raises(UserError, match="cannot be read"):
        CheckpointStore(loop, keep_last=1).newest()


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "c.pt"
    write_atomically(state(1), path)
    whole = path.read_bytes()
    for share in range(0, 100, 5):
        path.write_bytes(whole[: len(whole) * share // 100])
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_checkpoint(path)


def test_another_architecture_is_refused_naming_what_differs(tmp_path):
    other = Net()
    other.fc3 = torch.nn.Linear(84, 100)
    del other.conv1
    other.extra = torch.nn.Linear(1, 1, bias=False)
    with pytest.raises(UserError) as error:
        load_model(Net(), state(1, net=other), tmp_path / "c.pt")
    for part in ("another architecture", "conv1.bias", "extra.weight", "fc3.weight (100, 84) instead of (10, 84)"):
        assert part in str(error.value)


def test_finding_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no such file or run folder"):
        find_checkpoint(run)
    run.mkdir()
    with pytest.raises(UserError, match="holds no checkpoints"):
        find_checkpoint(run)
    folder = CheckpointStore(run / "checkpoints", keep_last=3)
    folder.write(state(7), best=True)
    newest = folder.write(state(8), best=False)
    assert find_checkpoint(run) == find_checkpoint(folder.directory) == newest
    assert find_checkpoint(folder.directory / "best.pt") == folder.directory / "best.pt"


def test_resuming_takes_the_newest_a_given_one_or_none(tmp_path):
    own = CheckpointStore(tmp_path / "own/checkpoints", keep_last=3)
    other = CheckpointStore(tmp_path / "other/checkpoints", keep_last=3).write(state(5), best=False)
    assert choose_resumable(load_config(), own, Net()) is None
    assert choose_resumable(load_config([], ["checkpoint.resume=never"]), own, Net()) is None
    given = load_config([], [f"checkpoint.resume={tmp_path / 'other'}"])
    assert choose_resumable(given, own, Net())[0] == other
    newest = own.write(state(9), best=False)
    assert choose_resumable(load_config(), own, Net())[0] == newest
    for config in (given, load_config([], ["checkpoint.resume=never"])):
        with pytest.raises(UserError, match=r"already holds step-00000009\.pt"):
            choose_resumable(config, own, Net())


def test_a_run_started_from_a_checkpoint_goes_on_by_the_same_command(tmp_path):
    other = CheckpointStore(tmp_path / "other/checkpoints", keep_last=3).write(state(5), best=False)
    own = CheckpointStore(tmp_path / "own/checkpoints", keep_last=3)
    same = load_config([], [f"checkpoint.resume={other}"])
    newest = own.write({**state(9), "started_from": str(other)}, best=False)
    assert choose_resumable(same, own, Net())[0] == newest
    with pytest.raises(UserError, match="already holds"):
        choose_resumable(load_config([], [f"checkpoint.resume={tmp_path / 'other'}"]), own, Net())


def test_inside_an_epoch_its_order_cannot_change_even_if_allowed(tmp_path):
    allowed = ["train.global_batch_size=64", "checkpoint.allow_changed=[train.global_batch_size]"]
    check_same_settings({**state(8), "batch": 0}, load_config([], allowed), tmp_path)
    with pytest.raises(UserError, match="8 batches into an epoch, where train"):
        check_same_settings({**state(8), "batch": 8}, load_config([], allowed), tmp_path)


def test_settings_that_change_the_result_are_refused_others_pass(tmp_path):
    saved = state(1)
    harmless = ["run.name=x", "data.num_workers=3", "train.log_every=1", "device=cpu", "train.accumulation_steps=2"]
    check_same_settings(saved, load_config([], harmless), tmp_path)
    changed = ["seed=1", "optim.lr=0.5"]
    with pytest.raises(UserError) as error:
        check_same_settings(saved, load_config([], changed), tmp_path)
    assert "seed (was 0, now 1), optim.lr (was 0.2, now 0.5)" in str(error.value)
    assert "checkpoint.allow_changed=[seed,optim.lr]" in str(error.value)
    check_same_settings(saved, load_config([], [*changed, "checkpoint.allow_changed=[seed,optim.lr]"]), tmp_path)
