import json

import pytest
import torch

from distlenet import ledger
from distlenet.data.sample_log import SampleLog, create_start, read_starts
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

INFO = {"samples": 10, "global_batch_size": 4, "steps_per_epoch": 3, "world_size": 2}


def write_start(run_dir, step, batches, world_size=2, info=INFO, epoch=0):
    """Write a start after ``step`` steps that uses these global batches."""
    directory = create_start(run_dir, step, info)
    logs = [SampleLog(directory, rank) for rank in range(world_size)]
    for number, batch in enumerate(batches, start=step):
        for rank, log in enumerate(logs):
            log.record(epoch, number, torch.tensor(batch[rank::world_size], dtype=torch.int64))
    for log in logs:
        log.close()
    return directory


def test_a_complete_epoch_in_one_start(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    assert ledger.check_run(tmp_path) == (
        ["epoch 1: 10 of 10 samples used, 0 more than once, 0 not used", "1 starts: every epoch is correct"],
        True,
    )


def test_steps_repeated_by_a_later_start_count_once(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])  # killed after step 3, last saved after step 1
    write_start(tmp_path, 1, [[4, 5, 6, 7]], world_size=1)  # killed before it saved
    write_start(tmp_path, 1, [[4, 5, 6, 7], [8, 9]], world_size=4)
    assert [start.step for start in read_starts(tmp_path)] == [0, 1, 1]
    lines, correct = ledger.check_run(tmp_path)
    assert correct
    assert lines[0] == "epoch 1: 10 of 10 samples used, 0 more than once, 0 not used"


def test_repeated_and_unused_samples_are_reported(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 3], [8, 9]])
    lines, correct = ledger.check_run(tmp_path)
    assert not correct
    assert lines[0] == "epoch 1: 9 of 10 samples used, 1 more than once (3), 1 not used (7)"


def test_a_step_skipped_by_a_restart_is_reported(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3]])
    write_start(tmp_path, 2, [[8, 9]])
    write_start(tmp_path, 3, [[0, 1, 2, 3]], epoch=1)
    lines, correct = ledger.check_run(tmp_path)
    assert not correct
    assert "4 not used (4, 5, 6, 7)" in lines[0]


def test_the_dropped_last_batch_is_listed(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 8]], info={**INFO, "steps_per_epoch": 2})
    lines, correct = ledger.check_run(tmp_path)
    assert correct
    assert "2 not used (7, 9), 2 in the dropped last batch" in lines[0]


def test_an_incomplete_last_epoch_is_correct(tmp_path):
    write_start(tmp_path, 0, [[0, 1, 2, 3]])
    assert ledger.check_run(tmp_path) == (
        ["epoch 1: incomplete, 4 of 10 samples so far, each once", "1 starts: every epoch is correct"],
        True,
    )


def test_a_truncated_last_line_is_ignored(tmp_path):
    directory = write_start(tmp_path, 0, [[0, 1, 2, 3]])
    with (directory / "rank-00001.jsonl").open("a") as file:
        file.write('{"epoch": 0, "st')
    assert "4 of 10" in ledger.check_run(tmp_path)[0][0]


def test_the_command_exits_with_status_1_if_an_epoch_is_wrong(tmp_path, monkeypatch, capsys, fails):
    write_start(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 3], [8, 9]])
    monkeypatch.setattr("sys.argv", ["ledger", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        ledger.main()
    assert exit_.value.code == 1
    assert "NOT every epoch is correct" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ledger", str(tmp_path / "none")])
    assert "has no ledger" in fails(ledger.main)


def test_a_start_stores_its_info(tmp_path):
    directory = write_start(tmp_path, 0, [])
    assert json.loads((directory / "start.json").read_text()) == INFO
    assert read_starts(tmp_path)[0].read_info() == INFO


def test_a_full_disk_is_reported_until_the_lines_are_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = SampleLog(create_start(tmp_path, 0, INFO), rank=0)
    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        log.record(0, 0, torch.tensor([1]))
        assert not log.flush()
    assert log.flush()
    log.close()
    assert len(list(read_starts(tmp_path)[0].read_lines())) == 1


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = SampleLog()
    log.record(0, 0, torch.tensor([1]))
    assert log.flush()
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rank-00000.jsonl", '{"epoch": 0, "step": "x", "indices": [1]}\n'),
        ("rank-00000.jsonl", "nonsense\n"),
        ("rank-00000.jsonl", '{"step": 1}\n'),
        ("start.json", "{"),
        ("start.json", '{"samples": 10}'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    directory = write_start(tmp_path, 0, [[0, 1, 2, 3]])
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: cannot be read or is damaged"):
        ledger.check_run(tmp_path)
