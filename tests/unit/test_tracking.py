import io
import json
import os
import pty
import re
import sys
import threading

import pytest
from conftest import run_command
from rich.console import Console

from distlenet.tracking.base import Trackers
from distlenet.tracking.history import History
from distlenet.tracking.progress_bar import ProgressBar, make_console
from distlenet.tracking.text import TextLogger, TutorialLogger
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

RUN_INFO = {
    "version": "1",
    "run": "mine",
    "model": "lenet",
    "data": "digits",
    "train_count": 1437,
    "data_source": "bundled",
    "world_size": 2,
    "backend": "gloo",
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
    "wandb": "disabled",
    "epochs": 2,
    "steps_per_epoch": 20,
    "global_batch_size": 64,
    "micro_batches": 1,
    "reduction": "ddp",
    "micro_batch_size": 32,
    "step": 0,
    "steps": 40,
    "complete": False,
    "evaluated": 0,
    "resumed_from": None,
}
SUMMARY = {"test_accuracy": 0.98765, "test_count": 360, "steps": 40, "folder": "runs/x"}
SUMMARY |= {"start_s": 2.31, "wall_s": 20.0, "train_images_per_s": 12345.6}
TIMES = "2.3 s to start, trained at 12,346 images/s, 20.0 s in all"


def train_record(step: int) -> dict:
    place = {"split": "train", "step": step, "epoch": 1, "batch": step, "loss": 0.5, "accuracy": 0.75, "count": 64}
    return {**place, "lr": 0.1, "images_per_s": 1000.0}


def record_of_test(step: int) -> dict:
    return {"split": "test", "step": step, "epoch": 1, "batch": step, "loss": 0.25, "accuracy": 0.9, "count": 360}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps, start=0):
    history = History(folder, "seed: 0\n")
    history.start({**RUN_INFO, "step": start, "evaluated": start, "complete": start == 40})
    for step in steps:
        history.log(train_record(step))
    return history


def test_history_has_one_object_a_line_at_once(tmp_path):
    history = write(tmp_path, [1, 2])
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]  # before it is closed: a kill loses nothing
    history.finish(SUMMARY)
    history.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4]).close()
    write(tmp_path, [3, 4, 5], start=2).close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_an_evaluation_that_no_checkpoint_has_is_made_and_recorded_again(tmp_path):
    history = write(tmp_path, [19, 20])
    history.log(record_of_test(20))
    history.close()
    again = History(tmp_path, "")
    again.start({**RUN_INFO, "step": 20, "evaluated": 0})
    again.close()
    assert [(record["split"], record["step"]) for record in lines(tmp_path)] == [("train", 19), ("train", 20)]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    write(tmp_path, [1, 2]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    write(tmp_path, [3], start=2).close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["", "{}", "3", '{"step": "x"}', "garbled"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    write(tmp_path, [1]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no record"):
        write(tmp_path, [], start=1)


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    history = write(tmp_path, [])
    history.log({**train_record(1), "loss": float("nan"), "lr": float("inf")})
    history.finish({**SUMMARY, "test_loss": float("-inf")})
    history.close()
    (record,) = lines(tmp_path)
    assert (record["loss"], record["lr"], record["step"]) == (None, None, 1)
    assert json.loads((tmp_path / "summary.json").read_text())["test_loss"] is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_files_that_cannot_be_written_are_told(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"run folder {tmp_path}: cannot be written"):
        write(tmp_path, [1])


def test_the_settings_are_kept_when_the_run_starts_not_before(tmp_path):
    history = History(tmp_path, "seed: 5\n")
    assert not (tmp_path / "config.yaml").exists()
    history.start(RUN_INFO)
    history.sync()
    history.close()
    assert (tmp_path / "config.yaml").read_text() == "seed: 5\n"


def test_starting_anew_empties_an_old_history(tmp_path):
    write(tmp_path, [1, 2]).close()
    write(tmp_path, [], start=0).close()
    assert lines(tmp_path) == []


def test_a_complete_run_keeps_its_summary(tmp_path):
    for measured in (1234.5, None):
        history = write(tmp_path, [], start=0 if measured else 40)
        history.finish({**SUMMARY, "train_images_per_s": measured})
    assert json.loads((tmp_path / "summary.json").read_text())["train_images_per_s"] == 1234.5


def test_plain_lines_come_at_most_every_few_seconds(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 4.9, 5.1, 5.1, 6.0])
    monkeypatch.setattr("distlenet.tracking.text.time.monotonic", lambda: next(clock))
    console = TextLogger()
    console.start(RUN_INFO)
    capsys.readouterr()
    for step in (1, 2, 3, 4, 5):
        console.log(train_record(step))
    shown = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/40", line).group(1) for line in shown] == ["1", "4"]
    assert shown[0].endswith("loss 0.5000  accuracy 75.0%  lr 0.1  1,000 images/s  0:00:03 left")


def test_tests_and_results_are_always_shown(capsys):
    console = TextLogger()
    console.start(RUN_INFO)
    console.log(record_of_test(20))
    console.log(record_of_test(40))
    console.finish(SUMMARY)
    out = capsys.readouterr().out
    assert out.count("test accuracy 90.00% of 360 images") == 2
    assert out.endswith(
        "Accuracy of the network on the 360 test images: 98.8 %\n" + TIMES + "\nFiles of this run: runs/x\n"
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, "global batch 64 = ranks 2 × micro-batches 1 × images 32"),
        ({"step": 8, "resumed_from": "runs/x/c.pt"}, "resumed at step 8 of 40 from runs/x/c.pt"),
        ({"step": 40, "complete": True}, "this run is complete; to train on: run.name=mine checkpoint.allow"),
    ],
)
def test_the_opening_says_what_runs_where(capsys, change, part):
    TextLogger().start({**RUN_INFO, **change})
    assert part in capsys.readouterr().out


def test_the_tutorials_lines(capsys):
    console = make_console("tutorial")
    assert isinstance(console, TutorialLogger)
    console.log({**train_record(2000), "loss": 1.23449})
    console.log({**train_record(12000), "epoch": 2})
    console.finish(SUMMARY)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["[1,  2000] loss: 1.234", "[2, 12000] loss: 0.500", "Finished Training"]


def test_training_goes_on_when_nobody_reads(tmp_path):
    """``| head -1`` and a full disk: the loss of standard output is told once, elsewhere."""
    script = (
        "from distlenet.tracking.text import TextLogger\n"
        "lines = TextLogger()\n"
        "for number in range(5000): lines.print(f'line {number}')\n"
        "import sys; print('done', file=sys.stderr)\n"
    )
    command = f'{sys.executable} -c "$SCRIPT"'
    for shell in (f"{command} | head -1; exit ${{PIPESTATUS[0]}}", f"{command} > /dev/full"):
        ended = run_command("bash", "-c", shell, env={"SCRIPT": script}, timeout=60, cwd=tmp_path).succeeded()
        told = ended.stderr.splitlines()
        assert len(told) == 2, str(ended)
        assert told[0].startswith("distlenet: standard output is gone")
        assert told[1] == "done"


def test_no_terminal_no_bar(capsys):
    assert type(make_console("auto")) is TextLogger
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    """A real pseudo-terminal: the bar redraws in place, and the last lines stay below it."""
    master, slave = pty.openpty()
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(iter(lambda: read(master), b"")))
    reader.start()
    with os.fdopen(slave, "w", buffering=1) as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        console = make_console("auto")
        assert isinstance(console, ProgressBar)
        console.start(RUN_INFO)
        console.log(train_record(10))
        console.log(record_of_test(20))
        console.finish(SUMMARY)
    reader.join(timeout=30)
    os.close(master)
    text = b"".join(shown).decode()
    assert "loss 0.500  acc 75.0%  1,000 images/s" in text
    assert "40/40" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")
    assert plain.rstrip().endswith(
        "Accuracy of the network on the 360 test images: 98.8 %\n" + TIMES + "\nFiles of this run: runs/x"
    )
    assert plain.count("Accuracy of the network") == 1


class Screen(io.StringIO):
    """A terminal of any width, in a file."""

    def lines(self) -> list[str]:
        """Return what was ever shown on it, without escape codes."""
        return re.split("[\n\r]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()))


def shown(width: int) -> Screen:
    """Show 20 steps and an evaluation, twice."""
    screen = Screen()
    bar = ProgressBar(Console(file=screen, width=width, force_terminal=True, color_system="256", highlight=False))
    bar.start(RUN_INFO)
    for last in (20, 40):
        bar.log(train_record(last))
        bar.progress.refresh()
        bar.log({**train_record(last), "split": "train_epoch", "loss": 0.375})
        bar.log(record_of_test(last))
    bar.finish(SUMMARY)
    return screen


@pytest.mark.parametrize(
    ("width", "beside"),
    [
        (40, r"1/2 \S+ loss 0\.500  0:00:01 left"),
        (60, r"1/2 \S+ 20/40  loss 0\.500  acc 75\.0%  0:00:01 left"),
        (80, r"epoch 1/2 \S+ 20/40  loss 0\.500  acc 75\.0%  1,000 images/s  0:00:01 left"),
        (120, r"epoch 1/2 \S+ 20/40  loss .*  1,000 images/s  lr 0\.1  2 ranks  0:00:01 left"),
    ],
)
def test_the_bar_fits_its_terminal(width, beside):
    """20 steps of 1437 images in 20 steps are left, at 1,000 images/s."""
    lines = shown(width).lines()
    assert any(re.fullmatch(beside, line.rstrip()) for line in lines), lines
    bars = [line for line in lines if "left" in line]
    assert max(len(line) for line in bars) <= width
    assert not any("…" in line for line in bars)


@pytest.mark.parametrize(
    ("width", "table"),
    [
        (40, [["epoch", "test loss", "test acc"], ["1/2", "0.2500", "90.00%"]]),
        (
            78,
            [
                ["epoch", "step", "train loss", "train acc", "test loss", "test acc", "test images"],
                ["1/2", "20", "0.3750", "75.00%", "0.2500", "90.00%", "360"],
            ],
        ),
    ],
)
def test_evaluations_are_a_table_that_grows(width, table):
    lines = shown(width).lines()
    cells = [re.split("  +", line.strip()) for line in lines]
    (heading,) = (number for number, line in enumerate(cells) if line == table[0])
    assert table[1] in cells
    rows = [line.rstrip() for line in lines if "90.00%" in line]
    assert len(rows) == 2
    assert {len(row) for row in rows} == {len(lines[heading].rstrip())}  # right-aligned, all columns in line
    assert len(rows[0]) <= width


def test_no_color_is_respected(monkeypatch):
    assert "\x1b[38;5;" in shown(80).getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[(3|4|9)[0-9]", shown(80).getvalue())


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


def test_trackers_pass_on_to_each_and_none_is_fine(tmp_path, capsys):
    Trackers().log(train_record(1))
    both = Trackers([TutorialLogger(), History(tmp_path, "")])
    both.start(RUN_INFO)
    both.log(train_record(1))
    both.finish(SUMMARY)
    both.close()
    assert "[1,     1] loss: 0.500" in capsys.readouterr().out
    assert len(lines(tmp_path)) == 1
    assert (tmp_path / "summary.json").exists()


def slow_record(step, rank, times):
    paces = {"rank_images_per_s_min": 100.0, "rank_images_per_s_median": 100.0 * times, "rank_images_per_s_max": 200.0}
    return {**train_record(step), **paces, "slowest_rank": rank, "slowest_host": f"n{rank}"}


def test_a_rank_that_is_slow_all_the_time_is_named_once(capsys):
    console = TextLogger()
    console.start(RUN_INFO)
    ranks = [(3, 1.3)] * 4 + [(1, 1.3), (3, 1.3), (3, 1.3), (3, 1.1)] + [(3, 1.3)] * 4 + [(3, 1.31)] + [(3, 1.3)] * 4
    for step, (rank, times) in enumerate(ranks):
        console.log(slow_record(step, rank, times))
    told = [line for line in capsys.readouterr().out.splitlines() if "longer" in line]
    assert told == ["rank 3 on n3 computes 31% longer than the median, and all wait for it"]
