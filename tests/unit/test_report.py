import json
import re
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import REPO, run_command

from distlenet.config.loading import load_config, to_yaml
from distlenet.report.charts import POINTS, _thin
from distlenet.report.page import write_report
from distlenet.report.runs import class_accuracies, differences, read_run
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # one pixel


def make_run(folder, settings=(), steps=20, **details):
    """Write a run folder by hand: ``steps`` training records and one test."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config([], settings)))
    records = []
    for step in range(1, steps + 1):
        record = {"split": "train", "step": step, "epoch": 1, "batch": step, "time": 1.8e9 + step, "loss": 1 / step}
        record |= {"accuracy": 0.5, "count": 64, "lr": 0.1, "images_per_s": 1000.0, "grad_norm": 1.0}
        records.append({**record, "load": 0.1, "compute": 0.7, "wait": 0.2})
    records.append({**records[-1], "split": "test", "loss": 0.25, "accuracy": 0.875})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    start = {"time": "2027-01-15T08:00:00Z", "run_id": "ab", "step": 0, "world_size": 2, "host": "n1"}
    start["automatic"] = False
    (folder / "starts.jsonl").write_text((json.dumps(start) + "\n") * 2)
    mistake = {"index": 3, "label": 0, "predicted": 1, "confidence": 0.9, "png": PNG}
    content = {"classes": ["cat", "dog"], "confusion": [[3, 1], [0, 0]], "mistakes": [mistake], **details}
    (folder / "test.json").write_text(json.dumps(content))
    return folder


def test_a_page_of_one_run_has_everything_in_it(tmp_path):
    page = tmp_path / "run" / "report.html"
    write_report([read_run(make_run(tmp_path / "run"))], page)
    text = page.read_text()
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert len(titles) == 9
    assert text.count("<svg") == 9
    assert len(list((tmp_path / "run/report").glob("*.png"))) == 9
    assert "87.50%" in text
    assert "dog, 90 % sure; is cat" in text
    assert page.stat().st_size < 2_000_000
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)  # nothing is fetched


def test_several_runs_stand_side_by_side_with_what_differs(tmp_path):
    folders = [make_run(tmp_path / name, [f"optim.lr={lr}", f"seed={seed}"]) for name, lr, seed in RUNS]
    runs = [read_run(folder) for folder in folders]
    assert differences(runs) == [("seed", ["0", "0", "2"]), ("optim.lr", ["0.1", "0.2", "0.1"])]
    write_report(runs, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert re.search(r"<th>optim.lr</th><td>0.1</td><td>0.2</td><td>0.1</td>", text)
    assert "Confusion" not in text


RUNS = (("a", 0.1, 0), ("b", 0.2, 0), ("c", 0.1, 2))


def test_what_a_run_is_called_and_noted_is_text(tmp_path):
    evil = "<img src=x onerror=alert(1)>$x_{"
    folder = make_run(tmp_path / evil, [f"wandb.notes={json.dumps(evil)}"], classes=[evil, "dog"])
    other = make_run(tmp_path / "plain")
    for runs in ([folder], [folder, other]):
        write_report([read_run(run) for run in runs], tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text()
        assert "<img src=x" not in text
        assert "&lt;img src=x" in text


@pytest.mark.parametrize("gone", ["starts.jsonl", "test.json", "summary.json"])
def test_a_run_under_way_has_a_report_too(tmp_path, gone):
    folder = make_run(tmp_path / "run")
    (folder / gone).unlink(missing_ok=True)
    (folder / "metrics.jsonl").write_text("")
    write_report([read_run(folder)], folder / "report.html")
    assert "not complete" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "is not a run folder"),
        ("config.yaml", "- 1\n", "expected a mapping of settings"),
        ("config.yaml", "a: [", "config.yaml: not valid YAML"),
        ("metrics.jsonl", "nonsense\n", "line 1 is no record"),
        ("metrics.jsonl", 0, "is not a run folder"),
    ],
)
def test_what_is_no_run_is_told(tmp_path, file, content, message):
    folder = make_run(tmp_path / "run")
    if isinstance(content, str):
        (folder / file).write_text(content)
    else:
        (folder / file).unlink()
        if content == 0:
            (folder / file).mkdir()
    with pytest.raises(UserError, match=message):
        read_run(folder)


DAMAGED_STARTS = ['{"time": "x"}', '{"time": "2027-01-15T08:00:00Z", "run_id": 3}', "[]"]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("test.json", "{", True),
        ("test.json", "[1]", True),
        ("test.json", '{"classes": ["a"], "confusion": [[1, 2]], "mistakes": []}', True),
        ("test.json", '{"classes": ["a"], "confusion": [[-1]], "mistakes": []}', True),
        ("test.json", '{"classes": [1], "confusion": [[1]], "mistakes": []}', True),
        ("test.json", json.dumps({"classes": [], "confusion": [], "mistakes": []}), True),
        ("test.json", json.dumps({"classes": ["a"], "confusion": [[1]], "mistakes": []}), False),
        (
            "test.json",
            json.dumps({"classes": ["\ud800\x1b" * 5000] * 2, "confusion": [[1] * 2] * 2, "mistakes": []}),
            False,
        ),
        ("test.json", '{"classes": ["a"], "confusion": [[1]], "mistakes": [{"index": 1}]}', True),
        ("summary.json", "[1]", True),
        ("summary.json", '{"train_s": "long", "train_images_per_s": [1], "more": "\\ud800"}', False),
        *(("starts.jsonl", f"{line}\n", False) for line in DAMAGED_STARTS),
        ("starts.jsonl", 0, True),
        ("metrics.jsonl", '{"step": 1, "split": "test", "accuracy": "high", "loss": [2], "time": 1e308}\n', False),
        ("metrics.jsonl", '{"step": 1, "split": "train", "lr": 1' + "0" * 400 + ', "images_per_s": true}\n', False),
    ],
)
def test_a_damaged_part_is_left_out(tmp_path, capsys, file, content, told):
    folder = make_run(tmp_path / "run")
    if content == 0:
        (folder / file).unlink()
        (folder / file).mkdir()
    else:
        (folder / file).write_text(content)
    write_report([read_run(folder)], tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text() or file == "metrics.jsonl"
    said = capsys.readouterr().err
    assert said.count("the report leaves it out") == told
    assert (f"{folder / file}: " in said) == told


def test_a_page_of_many_runs_stays_small(tmp_path):
    """60 runs of 500 records."""
    first = make_run(tmp_path / "0", steps=500)
    runs = [replace(read_run(first), folder=tmp_path / str(number)) for number in range(60)]
    write_report(runs, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_long_lines_keep_their_mean():
    xs = list(range(1000))
    thin_xs, thin_ys = _thin(xs, [2.0 * x for x in xs])
    assert len(thin_xs) <= POINTS
    assert thin_ys == [2 * x for x in thin_xs]
    assert _thin([1, 2], [3, 4]) == ([1, 2], [3, 4])
    assert len(_thin(xs, xs, lines=40)[0]) <= POINTS // 5


def test_a_class_without_images_has_no_accuracy():
    assert class_accuracies({"classes": ["a", "b"], "confusion": [[3, 1], [0, 0]]}) == [("a", 0.75), ("b", None)]


def test_the_command_says_where_the_page_is(tmp_path):
    folder = make_run(tmp_path / "run")
    command = (sys.executable, "-m", "distlenet.report")
    ended = run_command(*command, folder).succeeded()
    assert ended.stdout == f"Report: {folder}/report.html\n"
    both = run_command(*command, folder, folder, "--output", tmp_path / "both.html").succeeded()
    assert both.stdout == f"Report: {tmp_path}/both.html\n"
    for words in ((tmp_path,), (folder, "--output", "page.txt"), ()):
        ended = run_command(*command, *words)
        assert ended.status == 2
        assert len(ended.stderr.splitlines()) == 1


def test_the_settings_of_a_run_are_those_that_yaml_says(tmp_path):
    run = read_run(make_run(tmp_path / "run", ["data.drop_last=true"]))
    assert run.settings["data.drop_last"] == "true"
    assert run.settings["train.max_steps"] == "null"
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["drop_last"] is True
    assert (REPO / "distlenet/report/page.html").exists()


def test_a_torn_line_of_starts_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = (folder / "starts.jsonl").read_text()
    (folder / "starts.jsonl").write_text('{"time": "20\nnull\n' + whole)
    assert len(read_run(folder).starts) == 2
