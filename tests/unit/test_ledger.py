import json

import pytest
import torch

from distlenet import ledger as command
from distlenet.data.sample_log import NoSampleLog, SampleLog, open_start, read_starts
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

FACTS = {"samples": 10, "global_batch_size": 4, "steps_per_epoch": 3, "world_size": 2}


def write(run, step, batches, world_size=2, facts=FACTS, epoch=0):
    """Write a start that goes on after ``step`` steps and takes these global batches."""
    folder = open_start(run, step, facts)
    ledgers = [SampleLog(folder, rank) for rank in range(world_size)]
    for number, batch in enumerate(batches, start=step):
        for rank, ledger in enumerate(ledgers):
            ledger.record(epoch, number, torch.tensor(batch[rank::world_size], dtype=torch.int64))
    for ledger in ledgers:
        ledger.close()
    return folder


def test_a_whole_epoch_in_one_start(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
    assert command.report(tmp_path) == (
        ["epoch 1: 10 of 10 images used, 0 more than once", "1 starts: every epoch is right"],
        True,
    )


def test_steps_that_a_later_start_trained_again_count_once(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])  # killed after step 3, having saved after step 1
    write(tmp_path, 1, [[4, 5, 6, 7]], world_size=1)  # killed again, having saved nothing
    write(tmp_path, 1, [[4, 5, 6, 7], [8, 9]], world_size=4)
    assert [start.step for start in read_starts(tmp_path)] == [0, 1, 1]
    assert command.report(tmp_path)[1]


def test_a_sample_used_twice_or_left_out_is_told(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 3], [8, 9]])
    lines, right = command.report(tmp_path)
    assert not right
    assert lines[0] == ("epoch 1: 9 of 10 images used, 1 more than once (such as 3), 1 left out (such as 7)")


def test_a_restart_that_skips_a_step_is_told(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3]])
    write(tmp_path, 2, [[8, 9]])
    write(tmp_path, 3, [[0, 1, 2, 3]], epoch=1)
    lines, right = command.report(tmp_path)
    assert not right
    assert "4 left out" in lines[0]


def test_the_dropped_tail_is_named(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 8]], facts={**FACTS, "steps_per_epoch": 2})
    lines, right = command.report(tmp_path)
    assert right
    assert "2 left out, of which 2 are the dropped last batch: 7, 9" in lines[0]


def test_an_epoch_under_way_is_not_wrong(tmp_path):
    write(tmp_path, 0, [[0, 1, 2, 3]])
    assert command.report(tmp_path) == (
        ["epoch 1: under way, 4 of 10 images, each once", "1 starts: every epoch is right"],
        True,
    )


def test_a_line_cut_short_by_a_kill_is_none(tmp_path):
    folder = write(tmp_path, 0, [[0, 1, 2, 3]])
    with (folder / "rank-00001.jsonl").open("a") as file:
        file.write('{"epoch": 0, "st')
    assert "4 of 10" in command.report(tmp_path)[0][0]


def test_the_command(tmp_path, monkeypatch, capsys, fails):
    write(tmp_path, 0, [[0, 1, 2, 3], [4, 5, 6, 3], [8, 9]])
    monkeypatch.setattr("sys.argv", ["ledger", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert "NOT every epoch is right" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["ledger", str(tmp_path / "none")])
    assert "has no ledger" in fails(command.main)


def test_starts_have_their_facts_and_no_ledger_writes_nothing(tmp_path):
    folder = write(tmp_path, 0, [])
    assert json.loads((folder / "start.json").read_text()) == FACTS
    with pytest.raises(UserError):
        command.report(tmp_path / "other")
    NoSampleLog().record(0, 0, torch.tensor([1]))
    NoSampleLog().close()


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
def test_a_ledger_that_holds_something_else_is_named(tmp_path, name, content):
    folder = write(tmp_path, 0, [[0, 1, 2, 3]])
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: is not as a run writes it"):
        command.report(tmp_path)
