"""Runs in an object store for tests: the store, and what a job does."""

import json
import threading

import pytest
from checkpoint_states import tiny_state
from s3_server import S3Server
from s3fs import S3FileSystem

from distlenet.checkpoint.format import is_intact
from distlenet.checkpoint.store import CheckpointStore
from distlenet.storage.objects import Objects
from distlenet.storage.stored_run import open_run

WAIT_S = 120.0  # for a thread of this process; it only ends a hang


@pytest.fixture(scope="module", name="server")
def server_fixture():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(name="url")
def url_fixture(server, monkeypatch, tmp_path, request):
    """The URL of a run that no other test uses, on a server without faults."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()  # it may be of another server
    monkeypatch.setattr("distlenet.storage.upload.POLL_S", 3600.0)  # tests select when to upload
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("distlenet.storage.lock.CHECKED_S", 0.0)  # each check queries the store
    server.fail()
    yield f"s3://runs/{request.node.name}/run"
    server.fail()
    server.app.hook = lambda _method, _path: None
    for thread in threading.enumerate():  # of a job that did not wait: its requests are not for the next test
        if thread.name == "upload":
            thread.join(WAIT_S)


def refuse_loss(by: str) -> None:
    pytest.fail(f"lost to {by}")


def start(url, directory, keep_last=2):
    """Open a run as a job does that does not wait."""
    directory.mkdir(exist_ok=True)
    return open_run(url, directory, keep_last, is_intact, 0.0, WAIT_S, refuse_loss)


def write_run(directory, step, keep_last=2, best=False):
    """Write what training writes until a checkpoint after ``step`` steps."""
    (directory / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    store = CheckpointStore(directory / "checkpoints", keep_last)
    store.save(tiny_state(step), best)
    assert store.wait() is None


def die(upload):
    """End a job as SIGKILL would: nothing more is uploaded, and the lock is not released."""
    upload.lock.release = lambda: None
    upload.upload = lambda *_: None
    assert upload.close(WAIT_S) is None
    upload.lock._stop.set()


def take_over(url):
    """Take the run from a job that seems to be dead, as another machine does after 45 s."""
    Objects(url).write(".locks/00000002", json.dumps({"nonce": "other", "host": "other"}).encode())


def names(url):
    return sorted(name for name in Objects(url).list() if not name.startswith(".locks/"))
