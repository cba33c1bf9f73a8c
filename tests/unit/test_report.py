import json
import re
import signal
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import REPO

from distlenet.config.loading import load_config, to_yaml
from distlenet.report.__main__ import main
from distlenet.report.charts import MAX_POINTS, thin
from distlenet.report.page import write_report
from distlenet.report.runs import differences, read_run
from distlenet.train import main as train_main
from distlenet.train import write_report as write_report_after_training
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one pixel


def make_run(run_dir, settings=(), steps=20, **details):
    """Write a run directory with ``steps`` training records and one test record."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(load_config([], settings)))
    records = []
    for step in range(1, steps + 1):
        record = {"split": "train", "step": step, "epoch": 1, "batch": step, "time": 1.8e9 + step, "loss": 1 / step}
        record |= {"accuracy": 0.5, "count": 64, "lr": 0.1, "images_per_s": 1000.0, "grad_norm": 1.0}
        records.append({**record, "load": 0.1, "compute": 0.7, "wait": 0.2})
    records.append({**records[-1], "split": "test", "loss": 0.25, "accuracy": 0.875})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    start = {"time": "2027-01-15T08:00:00Z", "run_id": "ab", "step": 0, "world_size": 2, "host": "n1"}
    start["automatic"] = False
    (run_dir / "starts.jsonl").write_text((json.dumps(start) + "\n") * 2)
    mistake = {"index": 3, "label": 0, "predicted": 1, "confidence": 0.9, "png": PNG}
    content = {"classes": ["cat", "dog"], "confusion": [[3, 1], [0, 0]], "mistakes": [mistake], **details}
    (run_dir / "test.json").write_text(json.dumps(content))
    return run_dir


def test_page_of_one_run_is_complete_and_self_contained(tmp_path):
    page = tmp_path / "run" / "report.html"
    write_report([read_run(make_run(tmp_path / "run"))], page)
    text = page.read_text()
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert len(titles) == 9
    assert text.count("<svg") == 9
    assert len(list((tmp_path / "run/report").glob("*.png"))) == 9
    assert "87.50%" in text
    assert "predicted dog (90 %), label cat" in text
    assert page.stat().st_size < 2_000_000
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)  # loads nothing


def test_images_of_a_task_are_shown_with_their_captions(tmp_path):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "test.json").write_text(json.dumps({"images": [{"caption": "drawn <0>", "png": PNG}] * 3}))
    write_report([read_run(run_dir)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count(f'src="data:image/png;base64,{PNG}">drawn &lt;0&gt;</figure>') == 3
    assert "Confusion" not in text


def test_page_of_several_runs_compares_them(tmp_path):
    run_dirs = [make_run(tmp_path / name, [f"optim.lr={lr}", f"seed={seed}"]) for name, lr, seed in RUNS]
    runs = [read_run(run_dir) for run_dir in run_dirs]
    assert differences(runs) == [("seed", ["0", "0", "2"]), ("optim.lr", ["0.1", "0.2", "0.1"])]
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"<th>optim.lr</th><td>0.1</td><td>0.2</td><td>0.1</td>", text)
    assert "Confusion" not in text


RUNS = (("a", 0.1, 0), ("b", 0.2, 0), ("c", 0.1, 2))


def test_names_and_notes_are_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>$x_{"
    run_dir = make_run(tmp_path / evil, [f"wandb.notes={json.dumps(evil)}"], classes=[evil, "dog"])
    other = make_run(tmp_path / "plain")
    for runs in ([run_dir], [run_dir, other]):
        write_report([read_run(run) for run in runs], tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text()
        assert "<img src=x" not in text
        assert "&lt;img src=x" in text


@pytest.mark.parametrize("gone", ["starts.jsonl", "test.json", "summary.json"])
def test_incomplete_run_has_a_report(tmp_path, gone):
    run_dir = make_run(tmp_path / "run")
    (run_dir / gone).unlink(missing_ok=True)
    (run_dir / "metrics.jsonl").write_text("")
    write_report([read_run(run_dir)], run_dir / "report.html")
    assert "not complete" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "is not a run directory"),
        ("config.yaml", "- 1\n", "expected a mapping of settings"),
        ("config.yaml", "a: [", "config.yaml: not valid YAML"),
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl: line 1 is "),
        ("metrics.jsonl", 0, "is not a run directory"),
    ],
)
def test_unreadable_run_is_refused(tmp_path, file, content, message):
    run_dir = make_run(tmp_path / "run")
    if isinstance(content, str):
        (run_dir / file).write_text(content)
    else:
        (run_dir / file).unlink()
        if content == 0:
            (run_dir / file).mkdir()
    with pytest.raises(UserError, match=message):
        read_run(run_dir)


LARGE_RATE = '{"step": 1, "split": "train", "lr": 1' + "0" * 400 + ', "images_per_s": true}\n'
LONG_NAMES = {"classes": ["\ud800\x1b" * 5000] * 2, "confusion": [[1] * 2] * 2, "mistakes": []}
DAMAGED_STARTS = ['{"time": "x"}', '{"time": "2027-01-15T08:00:00Z", "run_id": 3}', "[]"]


@pytest.mark.parametrize(
    ("file", "content", "charts"),
    [
        ("test.json", "{", None),
        ("test.json", "[1]", None),
        ("test.json", '{"classes": ["a"], "confusion": [[1, 2]], "mistakes": []}', None),
        ("test.json", '{"classes": ["a"], "confusion": [[-1]], "mistakes": []}', None),
        ("test.json", '{"classes": [1], "confusion": [[1]], "mistakes": []}', None),
        ("test.json", json.dumps({"classes": [], "confusion": [], "mistakes": []}), None),
        ("test.json", json.dumps({"classes": ["a"], "confusion": [[1]], "mistakes": []}), 9),
        pytest.param("test.json", json.dumps(LONG_NAMES), 9, id="long_names"),
        ("test.json", '{"classes": ["a"], "confusion": [[1]], "mistakes": [{"index": 1}]}', None),
        ("test.json", '{"images": [{"png": 1, "caption": "a"}]}', None),
        ("test.json", '{"images": []}', 7),
        ("summary.json", "[1]", None),
        ("summary.json", '{"train_s": "long", "train_images_per_s": [1], "more": "\\ud800"}', 9),
        *(("starts.jsonl", f"{line}\n", 9) for line in DAMAGED_STARTS),
        ("starts.jsonl", 0, None),
        ("metrics.jsonl", '{"step": 1, "split": "test", "accuracy": "high", "loss": [2], "time": 1e308}\n', 2),
        pytest.param("metrics.jsonl", LARGE_RATE, 2, id="large_rate"),
    ],
)
def test_damaged_part_is_left_out(tmp_path, capsys, file, content, charts):
    """``charts`` is their number, or None where the part is reported as damaged."""
    run_dir = make_run(tmp_path / "run")
    if content == 0:
        (run_dir / file).unlink()
        (run_dir / file).mkdir()
    else:
        (run_dir / file).write_text(content)
    run = read_run(run_dir)
    if charts is not None:  # other parts are empty: see test_incomplete_run_has_a_report
        write_report([run], tmp_path / "report.html")
        assert (tmp_path / "report.html").read_text().count("<svg") == charts
    stderr = capsys.readouterr().err
    assert stderr.count("the report omits it") == (charts is None)
    assert (f"{run_dir / file}: " in stderr) == (charts is None)


@pytest.mark.slow
def test_page_of_many_runs_is_small(tmp_path):
    """60 runs of 500 records."""
    first = make_run(tmp_path / "0", steps=500)
    runs = [replace(read_run(first), directory=tmp_path / str(number)) for number in range(60)]
    write_report(runs, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_thinning_keeps_the_mean():
    xs = list(range(1000))
    thin_xs, thin_ys = thin(xs, [2.0 * x for x in xs])
    assert len(thin_xs) <= MAX_POINTS
    assert thin_ys == [2 * x for x in thin_xs]
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])
    assert len(thin(xs, xs, lines=40)[0]) <= MAX_POINTS // 5


def test_class_without_images_has_no_accuracy(tmp_path):
    write_report([read_run(make_run(tmp_path / "run"))], tmp_path / "report.html")
    chart = (tmp_path / "report.html").read_text().split("<figcaption>Accuracy of each class")[1]
    assert chart.count(">cat</text>") == chart.count(">75.0%</text>") == 1
    assert ">dog</text>" not in chart


def test_classes_with_equal_beginnings_have_one_bar_each(tmp_path):
    classes, confusion = [60 * "x" + end for end in "ab"], [[3, 1], [0, 2]]
    write_report([read_run(make_run(tmp_path / "run", classes=classes, confusion=confusion))], tmp_path / "report.html")
    chart = (tmp_path / "report.html").read_text().split("<figcaption>Accuracy of each class")[1]
    assert len(re.findall(">x{9,}[^<]*</text>", chart)) == 2


def test_a_run_whose_records_cannot_be_locked_is_refused(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (make_run(tmp_path / "run") / ".lock").mkdir()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "run"), "--replay-wandb"])
    assert f"{tmp_path}/run/.lock: cannot be locked: Is a directory" in fails(main)


def test_command_prints_the_path_of_the_page(tmp_path, monkeypatch, capsys, fails):
    run_dir = make_run(tmp_path / "run")

    def report(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        main()

    report(run_dir)
    assert capsys.readouterr().out == f"Report: {run_dir}/report.html\n"
    report(run_dir, run_dir, "--output", tmp_path / "both.html")
    assert capsys.readouterr().out == f"Report: {tmp_path}/both.html\n"
    assert "is not a run directory" in fails(lambda: report(tmp_path))
    assert "page.txt: expected a name that ends in .html" in fails(lambda: report(run_dir, "--output", "page.txt"))
    assert "the following arguments are required: RUN" in fails(lambda: report())
    (tmp_path / "file").touch()
    message = fails(lambda: report(run_dir, "--output", tmp_path / "file/page.html"))
    assert message.endswith("check its disk and permissions, or give --output FILE.html")


@pytest.mark.slow
def test_a_report_that_fails_is_one_line_and_a_warning_after_training(tmp_path, monkeypatch, capfd):
    run_dir = make_run(tmp_path / "run")
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    agent = {"RUN_ID": "1", "RESTART_COUNT": "0", "MAX_RESTARTS": "3", "ERROR_FILE": str(tmp_path / "error.json")}
    for name, value in agent.items():  # a rank would end its parent process, torchrun's agent
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the command has ended its parent process"))
    try:
        assert not write_report_after_training(str(run_dir))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not (tmp_path / "error.json").exists()
    install, warning = capfd.readouterr().err.splitlines()
    assert install == "distlenet: matplotlib: not installed; pip install 'distlenet[report]'"
    fix = f"python -m distlenet.report {run_dir} writes it"
    assert warning == f"distlenet: no report: the command ended with status 2; {fix}"


def test_a_missing_package_is_one_warning_after_training(monkeypatch, capfd):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not write_report_after_training("runs/first")
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning == (
        "distlenet: no report: matplotlib: not installed; pip install 'distlenet[report]'; then "
        "python -m distlenet.report runs/first writes it"
    )


def test_a_missing_package_is_an_error_before_a_training_that_always_writes_a_report(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("distlenet.train.train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["train", "run.report=always"])
    with pytest.raises(UserError, match=r"run\.report=always: matplotlib: not installed; pip install"):
        train_main()


def test_settings_are_yaml_values(tmp_path):
    run = read_run(make_run(tmp_path / "run", ["data.drop_last=true"]))
    assert run.settings["data.drop_last"] == "true"
    assert run.settings["train.max_steps"] == "null"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["drop_last"] is True
    assert (REPO / "distlenet/report/page.html").exists()


def test_damaged_line_of_starts_is_skipped(tmp_path):
    run_dir = make_run(tmp_path / "run")
    whole = (run_dir / "starts.jsonl").read_text()
    (run_dir / "starts.jsonl").write_text('{"time": "20\nnull\n' + whole)
    assert len(read_run(run_dir).starts) == 2
