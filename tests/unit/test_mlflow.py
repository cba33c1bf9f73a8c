"""MLflow's real client, with a store of files, and with a server that is away."""

import json
import re
import socket

import pytest

from distlenet import train
from distlenet.config.loading import load_config
from distlenet.tracking.mlflow import CLIENT_DEFAULTS, Mlflow, mlflow_tracking_uri
from distlenet.tracking.sender import make_sinks
from distlenet.utils.errors import UserError

pytestmark = pytest.mark.unit

RUN_INFO = {"run_id": "0a1b2c3d", "version": "1", "world_size": 2, "hosts": ["n2", "n1"]}
RUN_INFO |= {"backend": "gloo", "device": "cpu", "precision": "fp32"}


@pytest.fixture(autouse=True)
def _no_requests_but_to_the_server(monkeypatch):
    for name, value in CLIENT_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # any other local store needs SQLAlchemy


@pytest.fixture
def store(tmp_path):
    return f"file:{tmp_path / 'store'}"


def config_of(store, *more):
    return load_config([], ["mlflow.enabled=true", f"mlflow.tracking_uri={store}", *more])


def runs_of(store, experiment="distlenet"):
    import mlflow

    client = mlflow.MlflowClient(store)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(client, run, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def record(step, split="train"):
    return {"split": split, "step": step, "epoch": 1, "loss": 1 / step, "time": 100.5, "slowest_host": "n1", "lr": None}


def test_a_resumed_run_continues_the_same_mlflow_run_with_each_step_once(tmp_path, store):
    """The first start ends without a word, after a flush; the second trains step 4 again and has other settings."""
    first = Mlflow(tmp_path / "run", config_of(store, "data.num_workers=1").to_dict(), RUN_INFO)
    for step in (2, 4):
        first.put(record(step))
    first.flush()
    first.put(record(6))  # not sent
    resumed = Mlflow(tmp_path / "run", config_of(store, "data.num_workers=2").to_dict(), RUN_INFO)
    assert runs_of(store)[1][0].info.status == "RUNNING"
    for each in (record(2), record(4), record(4, "test"), record(6)):
        resumed.put(each)
    resumed.finish("finished", {"steps": 6, "test_loss": 0.25, "run_dir": "runs/run"}, {})
    client, (run,) = runs_of(store)
    assert history(client, run, "train/loss") == [(2, 1 / 2), (4, 1 / 4), (6, 1 / 6)]
    assert history(client, run, "test/loss") == [(4, 1 / 4)]
    assert history(client, run, "summary/test_loss") == [(6, 0.25)]
    assert client.get_metric_history(run.info.run_id, "train/loss")[0].timestamp == 100500
    assert run.data.metrics.keys() >= {"train/epoch", "train/step"}
    assert not run.data.metrics.keys() & {"train/time", "train/slowest_host", "train/lr"}
    assert (run.data.params["optim.lr"], run.data.params["data.num_workers"]) == ("0.2", "1")
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.tags["hosts"] == "['n1', 'n2']"


@pytest.mark.parametrize(("outcome", "status"), [("preempted", "KILLED"), ("failed", "FAILED")])
def test_the_status_is_that_of_the_last_job(tmp_path, store, outcome, status):
    Mlflow(tmp_path / "run", config_of(store).to_dict(), RUN_INFO).finish(outcome, {}, {})
    assert runs_of(store)[1][0].info.status == status
    Mlflow(tmp_path / "run", config_of(store).to_dict(), RUN_INFO)
    assert [run.info.status for run in runs_of(store)[1]] == ["RUNNING"]


def test_many_records_are_sent_in_requests_of_a_size_that_servers_accept(tmp_path, store, monkeypatch):
    import mlflow

    sizes = []
    sink = Mlflow(tmp_path / "run", config_of(store, "mlflow.experiment=other").to_dict(), RUN_INFO)
    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", lambda *_, metrics: sizes.append(len(metrics)))
    for step in range(1, 601):
        sink.put(record(step))
    sink.flush()
    sink.flush()
    assert sizes == [999, 801]  # three numbers of each record: loss, epoch and step


def test_a_name_with_other_characters_is_replaced(tmp_path, store):
    sink = Mlflow(tmp_path / "run", config_of(store).to_dict(), RUN_INFO)
    sink.put({**record(1), "precision@5": 0.5})
    sink.flush()
    assert runs_of(store)[1][0].data.metrics["train/precision_5"] == 0.5


def test_the_address_is_given_or_that_of_the_environment():
    environ = {"MLFLOW_TRACKING_URI": "http://user:password@server"}
    assert mlflow_tracking_uri(None, environ) == environ["MLFLOW_TRACKING_URI"]
    for uri in ("https://server", "file:/mlruns", "databricks", "databricks://profile"):
        assert mlflow_tracking_uri(uri, environ) == uri
    with pytest.raises(UserError, match="no server is given; set MLFLOW_TRACKING_URI"):
        mlflow_tracking_uri(None, {})
    with pytest.raises(UserError, match=r"mlflow\.tracking_uri: contains a password.*set MLFLOW_TRACKING_URI") as error:
        mlflow_tracking_uri("http://user:secret@server", {})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("uri", ["127.0.0.1:5999", "localhost:5000", "server", "user:secret@server"])
def test_an_address_without_a_scheme_is_an_error(uri):
    in_environment = {"MLFLOW_TRACKING_URI": uri}
    for given, environ, source in ((uri, {}, "mlflow.tracking_uri"), (None, in_environment, "MLFLOW_TRACKING_URI")):
        with pytest.raises(UserError, match=rf"^{source}: contains no ://; expected http://HOST:PORT") as error:
            mlflow_tracking_uri(given, environ)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "postgresql+psycopg2://server/mlflow"])
def test_a_database_needs_the_full_package(monkeypatch, uri):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert mlflow_tracking_uri(uri, {}) == uri
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sqlalchemy" else object())
    with pytest.raises(UserError, match=r"mlflow\.tracking_uri: a database needs .*; pip install mlflow$"):
        mlflow_tracking_uri(uri, {})


def test_a_training_is_a_run_of_mlflow(tmp_path, store, capfd):
    settings = ("data.name=digits", "device=cpu", "train.max_steps=6", "train.log_every=2", "run.name=run")
    train.train(config_of(store, *settings, f"run.dir={tmp_path}", "wandb.finish_timeout_s=600"))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    client, (run,) = runs_of(store)
    assert history(client, run, "train/loss") == [(r["step"], r["loss"]) for r in records if r["split"] == "train"]
    assert history(client, run, "test/accuracy") == [(6, records[-1]["accuracy"])]
    assert run.info.status == "FINISHED"
    assert "MLflow" not in capfd.readouterr().err


def test_a_server_that_is_away_is_one_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        config = config_of(f"http://127.0.0.1:{unused.getsockname()[1]}").to_dict()
        assert make_sinks(tmp_path, {"sinks": ["mlflow"], "config": config, "run_info": RUN_INFO}) == {}
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("distlenet: MLflow: ")
    end = "nothing more is sent there now; a later start of the run sends the rest, unless it is complete"
    assert re.search(r"\w…; " + end, warning)  # its text is long
