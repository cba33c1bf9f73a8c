"""What a run in an object store must not lose: faults of the local copy, suspended jobs, full disks."""

import pytest
from stored_runs import WAIT_S, die, names, server_fixture, start, url_fixture, write_run  # noqa: F401  # fixtures

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore
from distlenet.storage.objects import Objects

pytestmark = pytest.mark.unit


def truncate(path, size):
    """Damage a file as a power cut does: the same inode, less content."""
    with open(path, "r+b") as file:
        file.truncate(size)


# ---- a damaged local copy


@pytest.mark.parametrize("damaged", [{1, 2}, {2}, {1}])
def test_a_damaged_checkpoint_is_downloaded_again(url, tmp_path, damaged, capsys):
    first = start(url, tmp_path / "a")
    for step in (1, 2):
        write_run(tmp_path / "a", step)
        first.upload()
    assert first.close(WAIT_S) is None
    for step in damaged:
        truncate(tmp_path / "a" / "checkpoints" / f"step-0000000{step}.pt", 1000)
    second = start(url, tmp_path / "a")
    path, state = CheckpointStore(tmp_path / "a" / "checkpoints", 2).load_newest()
    assert (path.name, state["step"]) == ("step-00000002.pt", 2)
    assert ("step-00000002.pt: is damaged, or older than in s3://" in capsys.readouterr().err) == (2 in damaged)
    write_run(tmp_path / "a", 3)
    assert second.close(WAIT_S) is None
    assert [name for name in names(url) if "step-" in name][-2:] == [
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000003.pt",
    ]


def test_a_damaged_checkpoint_that_only_the_disk_has(url, tmp_path):
    """The run resumes from the newest undamaged one, of the disk or of the store."""
    first = start(url, tmp_path / "a", keep_last=3)
    for step in (1, 2):
        write_run(tmp_path / "a", step, keep_last=3)
        first.upload()
    die(first)
    for step in (3, 4):
        write_run(tmp_path / "a", step, keep_last=3)
    truncate(tmp_path / "a" / "checkpoints" / "step-00000004.pt", 1000)
    second = start(url, tmp_path / "a", keep_last=3)
    assert CheckpointStore(tmp_path / "a" / "checkpoints", 3).load_newest()[1]["step"] == 3
    assert second.close(WAIT_S) is None


def test_a_damaged_best_checkpoint_does_not_replace_that_of_the_store(url, tmp_path):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1, best=True)
    assert first.close(WAIT_S) is None
    truncate(tmp_path / "a" / "checkpoints" / "best.pt", 1000)
    assert start(url, tmp_path / "a").close(WAIT_S) is None
    Objects(url).download("checkpoints/best.pt", tmp_path / "best.pt")
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_a_truncated_history_does_not_replace_that_of_the_store(url, tmp_path, capsys):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    history = tmp_path / "a" / "metrics.jsonl"
    truncate(history, 0)
    second = start(url, tmp_path / "a")
    assert history.read_text() == '{"step": 1}\n'
    assert "metrics.jsonl: is damaged, or older than in s3://" in capsys.readouterr().err
    with open(history, "a") as file:
        file.write('{"step": 2}\n')
    assert second.close(WAIT_S) is None
    assert Objects(url).read("metrics.jsonl") == b'{"step": 1}\n{"step": 2}\n'
    assert not (tmp_path / "a" / ".stale").exists()  # nothing else is replaced
