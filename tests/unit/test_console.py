"""Console output: plain lines, the tutorial's lines, and the progress bar."""

import io
import os
import pty
import re
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import run_command
from rich.console import Console

from distlenet.tracking.progress_bar import ProgressBar, make_console
from distlenet.tracking.text import TextLogger, TutorialLogger

pytestmark = pytest.mark.unit

RUN_INFO = {
    "version": "1",
    "run": "name",
    "model": "lenet",
    "data": "digits",
    "train_count": 1437,
    "data_source": "bundled",
    "unit": "images",
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
    "initialised_from": None,
}
TIMED = {"steps": 40, "run_dir": "runs/x", "start_s": 2.31, "wall_s": 20.0, "train_images_per_s": 12345.6}
SUMMARY = {"test_accuracy": 0.98765, "test_count": 360, **TIMED}
SELECTED = {"stopped_early": True, "best_by": "val/rmse", "best_value": 1.5, "best_step": 20}
TIMES = "2.3 s to start, trained at 12,346 images/s, 20.0 s in all"


def train_record(step: int) -> dict:
    result = {"loss": 0.5, "accuracy": 0.75, "count": 64, "lr": 0.1, "images_per_s": 1000.0}
    return {"split": "train", "step": step, "epoch": 1, "batch": step, **result}


def evaluation(step: int) -> dict:
    return {"split": "test", "step": step, "epoch": 1, "batch": step, "loss": 0.25, "accuracy": 0.9, "count": 360}


def test_training_lines_are_limited_in_time(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 4.9, 5.1, 5.1, 6.0])
    monkeypatch.setattr("distlenet.tracking.text.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console = TextLogger()
    console.start(RUN_INFO)
    capsys.readouterr()
    for step in (1, 2, 3, 4, 5):
        console.log(train_record(step))
    shown = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/40", line).group(1) for line in shown] == ["1", "4"]
    assert shown[0].endswith("loss 0.5000  accuracy 75.0%  lr 0.1  1,000 images/s  0:00:03 left")


def test_every_evaluation_and_the_result_are_printed(capsys):
    console = TextLogger()
    console.start(RUN_INFO)
    console.log(evaluation(20))
    console.log(evaluation(40))
    console.finish(SUMMARY)
    out = capsys.readouterr().out
    assert out.count("test accuracy 90.00% of 360 images") == 2
    assert out.endswith(
        "Accuracy of the network on the 360 test images: 98.8 %\n" + TIMES + "\nFiles of this run: runs/x\n"
    )


def test_a_task_without_accuracy_and_a_validation_set(capsys):
    """The metrics are those of the records, and samples are not called images."""
    console = TextLogger()
    console.start({**RUN_INFO, "model": "Prices", "data": None, "data_source": "", "unit": "samples"})
    record = {"epoch": 1, "step": 20, "batch": 20, "loss": 0.25, "rmse": 1.5, "count": 360}
    console.log({**record, "split": "train", "lr": 0.1, "images_per_s": 1000.0})
    console.log({**record, "split": "val", "r2": 0.5})
    console.finish({**TIMED, "test_loss": 0.25, "test_rmse": 1.5, "test_count": 360, **SELECTED})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "distlenet 1: Prices (1437 samples)"
    assert lines[3].startswith("epoch 1/2  step 20/40  loss 0.2500  rmse 1.5000  lr 0.1  1,000 samples/s")
    assert lines[4:8] == [
        "epoch 1/2  val loss 0.2500  val rmse 1.5000  val r2 0.5000 of 360 samples",
        "stopped early after step 40: train.stop_when did not improve",
        "best.pt: step 20, val/rmse 1.5000",
        "The network on the 360 test samples: loss 0.2500  rmse 1.5000",
    ]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, "global batch 64 = ranks 2 × micro-batches 1 × images 32"),
        (
            {"train_count": 38},
            "\ntrain.global_batch_size=64 is larger than the training set: each epoch is one step, of 38 ",
        ),
        ({"step": 8, "resumed_from": "runs/x/c.pt"}, "resumed at step 8 of 40 from runs/x/c.pt"),
        ({"initialised_from": "runs/x/c.pt"}, "\ninitial weights from runs/x/c.pt\n"),
        ({"step": 40, "complete": True}, "this run is complete; to train longer, give run.name=name checkpoint.allow"),
        ({"complete": True, "epochs": 9}, "checkpoint.allow_changed=[train.max_steps] and a larger train.max_steps"),
        ({"complete": True, "stopped_early": True}, "checkpoint.allow_changed=[train.stop_patience] and a larger"),
    ],
)
def test_the_opening_lines(capsys, change, part):
    TextLogger().start({**RUN_INFO, **change})
    assert part in capsys.readouterr().out


def test_the_tutorial_lines(capsys):
    console = make_console("tutorial")
    assert isinstance(console, TutorialLogger)
    console.log({**train_record(2000), "loss": 1.23449})
    console.log({**train_record(12000), "epoch": 2})
    console.finish(SUMMARY)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["[1,  2000] loss: 1.234", "[2, 12000] loss: 0.500", "Finished Training"]


def test_training_continues_if_standard_output_cannot_be_written(tmp_path):
    """``| head -1`` and a full disk cause one warning on standard error."""
    script = (
        "from distlenet.tracking.text import TextLogger\n"
        "lines = TextLogger()\n"
        "for number in range(50000): lines.print(f'line {number}')\n"
        "import sys; print('done', file=sys.stderr)\n"
    )
    command = f'{sys.executable} -c "$SCRIPT"'
    for shell in (f"{command} | head -1; exit ${{PIPESTATUS[0]}}", f"{command} > /dev/full"):
        ended = run_command("bash", "-c", shell, env={"SCRIPT": script}, cwd=tmp_path).succeeded()
        warning, done = ended.stderr.splitlines()
        assert warning.startswith("distlenet: standard output cannot be written")
        assert done == "done"


def test_without_a_terminal_there_is_no_bar(capsys):
    assert type(make_console("auto")) is TextLogger
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar(monkeypatch):
    """On a pseudo-terminal the bar is redrawn in place, and the last lines are below it."""
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
        console.log(evaluation(20))
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
    """A terminal in memory."""

    def lines(self) -> list[str]:
        """Return everything that was written to it, without escape codes."""
        return re.split("[\n\r]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue()))


def shown(width: int, validation: bool = False) -> Screen:
    """Show 20 steps and an evaluation, twice, on a terminal of ``width`` columns."""
    screen = Screen()
    bar = ProgressBar(Console(file=screen, width=width, force_terminal=True, color_system="256", highlight=False))
    bar.start(RUN_INFO)
    for last in (20, 40):
        bar.log(train_record(last))
        bar.progress.refresh()
        bar.log({**train_record(last), "split": "train_epoch", "loss": 0.375})
        if validation:
            bar.log({**evaluation(last), "split": "val", "loss": 0.3, "accuracy": 0.8})
        bar.log(evaluation(last))
    bar.finish(SUMMARY)
    return screen


@pytest.mark.parametrize(
    ("width", "bar"),
    [
        (40, r"1/2 \S+ loss 0\.500  0:00:01 left"),
        (60, r"1/2 \S+ 20/40  loss 0\.500  acc 75\.0%  0:00:01 left"),
        (80, r"epoch 1/2 \S+ 20/40  loss 0\.500  acc 75\.0%  1,000 images/s  0:00:01 left"),
        (120, r"epoch 1/2 \S+ 20/40  loss .*  1,000 images/s  lr 0\.1  2 ranks  0:00:01 left"),
    ],
)
def test_the_bar_fits_its_terminal(width, bar):
    """20 steps with 1437 images remain, at 1,000 images/s."""
    lines = shown(width).lines()
    assert any(re.fullmatch(bar, line.rstrip()) for line in lines), lines
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
def test_evaluations_are_rows_of_a_table(width, table):
    lines = shown(width).lines()
    cells = [re.split("  +", line.strip()) for line in lines]
    (heading,) = (number for number, line in enumerate(cells) if line == table[0])
    assert table[1] in cells
    rows = [line.rstrip() for line in lines if "90.00%" in line]
    assert len(rows) == 2
    assert {len(row) for row in rows} == {len(lines[heading].rstrip())}  # right-aligned
    assert len(rows[0]) <= width


@pytest.mark.parametrize(
    ("width", "table"),
    [
        (40, [["epoch", "val loss", "val acc"], ["1/2", "0.3000", "80.00%"]]),
        (
            78,
            [
                ["epoch", "train loss", "train acc", "val loss", "val acc", "test loss", "test acc"],
                ["1/2", "0.3750", "75.00%", "0.3000", "80.00%", "0.2500", "90.00%"],
            ],
        ),
        (
            110,
            [
                [
                    "epoch",
                    "step",
                    "train loss",
                    "train acc",
                    "val loss",
                    "val acc",
                    "test loss",
                    "test acc",
                    "test images",
                ],
                ["1/2", "20", "0.3750", "75.00%", "0.3000", "80.00%", "0.2500", "90.00%", "360"],
            ],
        ),
    ],
)
def test_the_table_has_the_validation_set(width, table):
    lines = shown(width, validation=True).lines()
    cells = [re.split("  +", line.strip()) for line in lines]
    assert table[0] in cells
    assert table[1] in cells
    assert max(len(line.rstrip()) for line, cell in zip(lines, cells, strict=True) if cell in table) <= width


def test_the_bar_without_any_metric():
    screen = Screen()
    bar = ProgressBar(Console(file=screen, width=110, force_terminal=True, highlight=False))
    bar.start(RUN_INFO)
    for record in (train_record(20), {**train_record(20), "split": "train_epoch"}, evaluation(20)):
        bar.log({key: value for key, value in record.items() if key != "accuracy"})
    bar.finish(SUMMARY)
    cells = [re.split("  +", line.strip()) for line in screen.lines()]
    assert ["epoch", "step", "train loss", "test loss", "test images"] in cells
    assert ["1/2", "20", "0.5000", "0.2500", "360"] in cells


def test_no_color_is_respected(monkeypatch):
    assert "\x1b[38;5;" in shown(80).getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[(3|4|9)[0-9]", shown(80).getvalue())


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


def slow_record(step, rank, ratio):
    speeds = {"rank_images_per_s_min": 100.0, "rank_images_per_s_median": 100.0 * ratio, "rank_images_per_s_max": 200.0}
    return {**train_record(step), **speeds, "slowest_rank": rank, "slowest_host": f"n{rank}"}


def test_a_rank_that_stays_slow_is_reported_once(capsys):
    console = TextLogger()
    console.start(RUN_INFO)
    ranks = [(3, 1.3)] * 4 + [(1, 1.3), (3, 1.3), (3, 1.3), (3, 1.1)] + [(3, 1.3)] * 4 + [(3, 1.31)] + [(3, 1.3)] * 4
    for step, (rank, ratio) in enumerate(ranks):
        console.log(slow_record(step, rank, ratio))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "longer" in line]
    assert warnings == ["rank 3 on n3 computes 31% longer than the median, and all ranks wait for it"]
