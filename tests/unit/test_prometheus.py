"""The file for Prometheus, as its official parser reads it."""

import pytest
from prometheus_client import parser

from distlenet.config.loading import load_config
from distlenet.tracking.prometheus import HELP, STATES, Prometheus
from distlenet.tracking.sender import make_sinks, send
from distlenet.tracking.sidecar import Sidecar
from distlenet.train import check_prometheus_file
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

RUN_INFO = {"run_id": "0a1b2c3d", "step": 50, "steps": 100, "restarts": 2, "skipped_steps": 0}
TRAIN = {"split": "train", "step": 60, "epoch": 2, "loss": 0.1, "accuracy": 0.75, "lr": 0.2, "images_per_s": 900.5}
TRAIN |= {"time": 1000.25, "count": 10, "batch": 3, "slowest_host": "n1", "load": 0.1, "skipped_steps": 1}


def config_of(path, *more):
    return load_config([], [f"tracking.prometheus={path}", "wandb.mode=disabled", *more]).to_dict()


def samples_of(path):
    """Return {(metric, labels other than the run and the job): value}, and all sets of those two labels."""
    found, owners = {}, set()
    for family in parser.text_string_to_metric_families(path.read_text()):
        name = family.name + "_total" * (family.type == "counter")
        assert family.documentation == HELP[name]
        for name, labels, value, *_ in family.samples:
            owners.add((labels.pop("run"), labels.pop("slurm_job_id")))
            assert (name, *labels.values()) not in found
            assert family.type == ("counter" if name.endswith("_total") else "gauge")
            found[(name, *labels.values())] = value
    return found, owners


def test_the_file_has_the_newest_numbers_of_each_split(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    path, run_dir = tmp_path / "lenet.prom", tmp_path / 'a "b"\\n'
    sink = Prometheus(run_dir, config_of(path), RUN_INFO)
    states = {("distlenet_state", state): float(state == "running") for state in STATES}
    first = states | {
        ("distlenet_step",): 50,
        ("distlenet_steps",): 100,
        ("distlenet_restarts_total",): 2,
        ("distlenet_skipped_steps_total",): 0,
    }
    assert samples_of(path) == (first, {(run_dir.name, "17")})
    for record in (TRAIN | {"step": 55, "loss": 9.0}, TRAIN, TRAIN | {"split": "test", "loss": 1e-7, "lr": None}):
        sink.put(record)
    sink.put({"split": "val", "step": 60, "epoch": 2, "time": 1000.5, "loss": None})  # not finite
    assert samples_of(path)[0] == first
    sink.flush()
    assert samples_of(path)[0] == first | {
        ("distlenet_step",): 60,
        ("distlenet_epoch",): 2,
        ("distlenet_learning_rate",): 0.2,
        ("distlenet_samples_per_second",): 900.5,
        ("distlenet_skipped_steps_total",): 1,
        ("distlenet_last_record_timestamp_seconds",): 1000.5,
        ("distlenet_loss", "train"): 0.1,
        ("distlenet_loss", "test"): 1e-7,
        ("distlenet_metric", "train", "accuracy"): 0.75,
        ("distlenet_metric", "test", "accuracy"): 0.75,
    }


@pytest.mark.parametrize("outcome", STATES[1:])
def test_the_file_stays_with_the_outcome(tmp_path, outcome):
    path = tmp_path / "lenet.prom"
    Prometheus(tmp_path / "run", config_of(path), RUN_INFO).finish(outcome, {}, {})
    found, owners = samples_of(path)
    assert [state for state in STATES if found["distlenet_state", state]] == [outcome]
    assert owners == {("run", "")}
    assert [file.name for file in tmp_path.iterdir()] == ["lenet.prom"]


def test_a_file_that_did_not_change_is_not_written_again(tmp_path):
    path = tmp_path / "lenet.prom"
    sink = Prometheus(tmp_path / "run", config_of(path), RUN_INFO)
    path.unlink()
    sink.flush()
    assert not path.exists()


def test_the_sender_writes_it_and_a_missing_directory_is_one_warning(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    for directory in (tmp_path, tmp_path / "missing"):
        config = config_of(directory / "lenet.prom")
        sidecar = Sidecar(tmp_path, config, lambda: 0.0)
        assert sidecar.sinks == ["prometheus"]
        sinks = make_sinks(tmp_path, {"sinks": sidecar.sinks, "config": config, "run_info": RUN_INFO})
        send(tmp_path, sinks, iter(["finished"]))
    assert samples_of(tmp_path / "lenet.prom")[0]["distlenet_state", "finished"] == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("distlenet: Prometheus: FileNotFoundError: ")
    assert Sidecar(tmp_path, load_config([], ["wandb.mode=disabled"]).to_dict(), lambda: 0.0).sinks == []


def test_a_directory_that_does_not_exist_is_an_error_at_the_start(tmp_path):
    check_prometheus_file(str(tmp_path / "run.prom"))
    with pytest.raises(
        UserError, match=r"missing/run\.prom: its directory does not exist or cannot be written; create it"
    ):
        check_prometheus_file(str(tmp_path / "missing" / "run.prom"))
