"""Commands on a run in an object store; see also tests/unit/test_storage.py and tests/cluster/test_object_store.py."""

import json

import pytest
from forked import run_python, run_ranks
from s3_server import S3Server

pytestmark = pytest.mark.ranks

SETTINGS = ("device=cpu", "data.name=digits", "train.epochs=3", "train.log_every=1", "checkpoint.every_steps=4")
RUN = "s3://runs/commands/first"


@pytest.fixture(scope="module")
def server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    return {**server.environment, "TMPDIR": str(tmp_path_factory.mktemp("temporary"))}


def test_the_commands_accept_urls(environment, tmp_path):
    words = ("-m", "distlenet.train", *SETTINGS, "run.dir=s3://runs/commands", "run.name=first", "run.report=always")
    trained = run_ranks(2, *words, env=environment).succeeded()
    assert f"Files of this run: {RUN}\n" in trained.stdout
    accuracy = trained.stdout.partition("test images: ")[2].split("%")[0]
    evaluated = run_python("-m", "distlenet.evaluate", f"checkpoint={RUN}", "--json", env=environment).succeeded()
    result = json.loads(evaluated.stdout)
    assert f"{100 * result['test_accuracy']:.1f} " == accuracy
    assert result["url"] == RUN
    page = (
        run_python("-m", "distlenet.report", RUN, env=environment).succeeded().stdout.removeprefix("Report: ").strip()
    )
    assert page.startswith(environment["TMPDIR"])
    checked = run_python("-m", "distlenet.preflight", "run.dir=s3://runs/commands", "data.name=digits", env=environment)
    assert "s3://runs/commands can be written and read" in checked.succeeded().stdout
    again = run_ranks(2, *words, f"run.local_dir={tmp_path}", env=environment).succeeded()
    assert "this run is complete" in again.stdout
    started = ("train.epochs=4", "run.name=second", f"checkpoint.init_from={RUN}", f"run.dir={tmp_path}")
    run_python("-m", "distlenet.train", *SETTINGS, *started, env=environment).succeeded()
