"""Runs in an object store: an S3 server in this process, which fails as a test requests."""

import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from stored_runs import (  # the fixtures are used by their names
    WAIT_S,
    die,
    names,
    refuse_loss,
    server_fixture,  # noqa: F401
    start,
    url_fixture,  # noqa: F401
    write_run,
)

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.preemption import Preemption
from distlenet.storage.fetch import fetch_run
from distlenet.storage.lock import LockLost, RunLock
from distlenet.storage.objects import Objects, StorageError, retry
from distlenet.storage.stored_run import closing_upload
from distlenet.storage.upload import ATTEMPTS
from distlenet.utils.errors import Preempted, UserError
from distlenet.utils.urls import is_url, local_copy_of, temporary_directory

pytestmark = pytest.mark.unit

# ---- paths


def test_urls_and_paths_are_distinguished():
    assert [is_url(path) for path in ("s3://b/x", "gs://b", "runs", "/data/s3://x", "C:/x", "s3:/b")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert str(local_copy_of("s3://b/../x//y", "/tmp")) == "/tmp/s3/b/x/y"


@pytest.mark.parametrize(("scheme", "message"), [("nonsense", "Protocol not known"), ("gs", "a package is missing")])
def test_a_store_that_cannot_be_used(scheme, message):
    with pytest.raises(UserError, match=message):
        Objects(f"{scheme}://bucket/run")


def test_the_directory_of_copies_is_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = temporary_directory()
    assert path.stat().st_mode & 0o777 == 0o700
    assert temporary_directory() == path
    path.chmod(0o755)
    with pytest.raises(UserError, match="is not a directory of this user alone"):
        temporary_directory()
    path.rmdir()
    path.write_text("a file")
    path.chmod(0o600)
    with pytest.raises(UserError, match="is not a directory of this user alone"):
        temporary_directory()


@pytest.mark.parametrize("text", ["s3://", "S3://bucket/runs", "s3:/bucket/runs"])
def test_a_url_with_a_mistake_is_not_a_directory(text):
    with pytest.raises(UserError, match=r"expected a directory, or a URL such as s3://bucket/prefix"):
        load_config([], [f"run.dir={text}"])


# ---- objects


@pytest.mark.parametrize("kind", ["error", "busy", "cut"])
def test_short_failures_are_repeated(server, url, kind):
    objects = Objects(url)
    server.fail(kind=kind, times=2)
    objects.write("x", b"content")
    assert server.fail()[f"PUT {kind}"] == 2
    assert objects.read("x") == b"content"


def test_an_object_is_created_once(server, url):
    objects = Objects(url)
    objects.create("x", b"first")
    objects.create("x", b"second")
    assert objects.read("x") == b"first"
    server.fail(kind="exists", method="PUT")  # as servers answer that do not say which condition
    objects.create("x", b"third")
    server.fail()
    assert objects.read("x") == b"first"


def test_a_wrong_key_fails_at_once_with_a_message(server, url):
    server.fail(kind="wrong_key")
    with pytest.raises(
        StorageError, match=r"/run: .* does not exist in our records; check the URL and the credentials"
    ):
        retry(Objects(url).list, 60.0)
    assert server.fail() == {"GET wrong_key": 1}


def test_a_store_that_does_not_answer_is_awaited(url, capsys):
    attempts = []

    def list_objects():
        attempts.append(1)
        if len(attempts) < 3:
            raise StorageError("down")
        return {}

    assert retry(list_objects, 60.0) == {}
    assert capsys.readouterr().err == "distlenet: down; trying again for up to 60 s\n"


# ---- the lock


def run_lock(url, copy, lost=refuse_loss, **times):
    return RunLock(Objects(url), copy, lost, **{"renew_s": 0.05, "expires_s": 60.0, "poll_s": 0.02, **times})


def test_a_run_has_one_writer(url):
    first = run_lock(url, "a")
    first.acquire(0.0)
    with pytest.raises(StorageError, match=f"job is writing there, process {os.getpid()}"):
        run_lock(url, "b").acquire(0.0)
    first.check()
    first.release()
    second = run_lock(url, "b")
    second.acquire(0.0)
    assert second.number == 2
    second.release()


def test_a_dead_job_does_not_keep_the_lock(url):
    dead = run_lock(url, "a", renew_s=3600.0)
    dead.acquire(0.0)
    successor = run_lock(url, "b", expires_s=0.2)
    successor.acquire(0.0)
    with pytest.raises(LockLost, match="has taken over this run"):  # if it was only suspended
        dead.check()
    dead.release()  # does not end the lock of the other
    successor.check()
    successor.release()


def test_lost_is_called_when_another_job_takes_the_run(url):
    lost = threading.Event()
    first = run_lock(url, "a", lambda _: lost.set())
    first.acquire(0.0)
    Objects(url).write(".locks/00000002", json.dumps({"nonce": "other", "host": "other"}).encode())
    assert lost.wait(WAIT_S)
    first.release()


def test_the_same_directory_needs_not_wait(url):
    first = run_lock(url, "a", renew_s=3600.0)
    assert not first.acquire(0.0)
    first.describe("a", complete=True)
    second = run_lock(url, "a", renew_s=3600.0)
    assert second.acquire(0.0)  # although the first was not released
    assert list(Objects(url).list(".locks")) == [".locks/00000002"]


def test_two_jobs_that_start_at_once(url):
    barrier, results = threading.Barrier(4), []

    def acquire(copy):
        barrier.wait(WAIT_S)
        try:
            job = run_lock(url, copy)
            job.acquire(0.0)
            results.append(job)
        except StorageError:
            results.append(None)

    threads = [threading.Thread(target=acquire, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    winners = [job for job in results if job is not None]
    assert len(results) == 4
    assert len(winners) == 1
    winners[0].check()
    winners[0].release()


def test_an_answer_that_a_suspended_job_reads_late_is_old(server, url, monkeypatch):
    """The clock advances between the request and the end of the check, as if the job was suspended then."""
    job = run_lock(url, "a", renew_s=3600.0)
    job.acquire(0.0)
    clock = SimpleNamespace(now=time.monotonic())
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("distlenet.storage.lock.time", clock)

    def suspend(method, path):
        if method == "GET" and path.endswith(".locks/00000001"):
            clock.now += job.expires_s

    server.app.hook = suspend
    job.check()
    with pytest.raises(StorageError, match="was interrupted for too long"):
        job.check_age()
    server.app.hook = lambda *_: None
    job.check()
    job.check_age()
    job.release()


# ---- a run


def test_another_machine_continues_the_run(url, tmp_path):
    first = start(url, tmp_path / "a")
    (tmp_path / "a" / "logs").mkdir()
    (tmp_path / "a" / "logs" / "rank-00000.log").write_text("log")
    for step in (1, 2, 3):
        write_run(tmp_path / "a", step, best=step == 2)
    assert first.close(WAIT_S) is None
    assert names(url) == [
        "checkpoints/best.pt",
        "checkpoints/step-00000003.pt",
        "logs/0001/rank-00000.log",
        "metrics.jsonl",
    ]
    second = start(url, tmp_path / "b")
    for name in ("metrics.jsonl", "checkpoints/best.pt", "checkpoints/step-00000003.pt"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    assert not (tmp_path / "b" / "logs").exists()
    write_run(tmp_path / "b", 4)
    second.upload()
    assert {"checkpoints/step-00000003.pt", "checkpoints/step-00000004.pt"} < set(names(url))
    write_run(tmp_path / "b", 5)
    assert second.close(WAIT_S) is None
    steps = [name for name in names(url) if "step-" in name]
    assert steps == ["checkpoints/step-00000004.pt", "checkpoints/step-00000005.pt"]  # keep_last=2
    assert find_checkpoint(url).name == "step-00000005.pt"
    assert load_checkpoint(find_checkpoint(f"{url}/checkpoints/best.pt"))["step"] == 2
    assert (fetch_run(url) / "metrics.jsonl").read_text() == '{"step": 5}\n'


def test_the_store_is_a_consistent_state_at_any_time(server, url, tmp_path):
    """The history is uploaded before its checkpoint; a failure between them leaves the older checkpoint."""
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    job.upload()
    write_run(tmp_path / "a", 2)
    server.fail(kind="wrong_key", method="PUT", path="step-00000002")
    with pytest.raises(StorageError, match=r"step-00000002\.pt"):
        job.upload()
    assert [name for name in names(url) if "step" in name] == ["checkpoints/step-00000001.pt"]
    assert Objects(url).read("metrics.jsonl") == b'{"step": 2}\n'
    server.fail()
    assert job.close(WAIT_S) is None
    assert "checkpoints/step-00000002.pt" in names(url)


def test_a_killed_job_resumes_from_its_disk_and_uploads_the_rest(url, tmp_path):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    first.upload()
    die(first)
    write_run(tmp_path / "a", 2)  # was not uploaded
    second = start(url, tmp_path / "a")
    assert (tmp_path / "a" / "checkpoints" / "step-00000002.pt").exists()
    assert second.close(WAIT_S) is None
    assert "checkpoints/step-00000002.pt" in names(url)


def test_an_outdated_local_copy_is_set_aside(url, tmp_path, capsys):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    write_run(tmp_path / "a", 9)  # of a job whose uploads failed
    second = start(url, tmp_path / "b")
    write_run(tmp_path / "b", 2)
    assert second.close(WAIT_S) is None
    third = start(url, tmp_path / "a")
    steps = sorted(path.name for path in (tmp_path / "a" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000002.pt"]
    assert (tmp_path / "a" / ".stale" / "before-00000003" / "checkpoints" / "step-00000009.pt").exists()
    assert "is older than s3://" in capsys.readouterr().err
    assert third.close(WAIT_S) is None


def test_a_local_copy_that_lost_files_is_downloaded_again(url, tmp_path):
    """As the temporary directory of a machine does, which removes old files."""
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    (tmp_path / "a" / "checkpoints" / "step-00000001.pt").unlink()
    second = start(url, tmp_path / "a")
    assert load_checkpoint(tmp_path / "a" / "checkpoints" / "step-00000001.pt")["step"] == 1
    assert second.close(WAIT_S) is None


def test_a_download_that_a_kill_interrupted_is_repeated(server, url, tmp_path):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    (tmp_path / "b").mkdir()
    server.fail(kind="wrong_key", method="GET", path="step-")
    with pytest.raises(StorageError):
        start(url, tmp_path / "b")
    server.fail()
    second = start(url, tmp_path / "b")
    assert (tmp_path / "b" / "checkpoints" / "step-00000001.pt").exists()
    assert second.close(WAIT_S) is None


def test_a_damaged_object_is_not_the_newest(url, tmp_path):
    first = start(url, tmp_path / "a")
    for step in (1, 2):
        write_run(tmp_path / "a", step)
        first.upload()
    assert first.close(WAIT_S) is None
    Objects(url).write("checkpoints/step-00000002.pt", b"damaged")
    second = start(url, tmp_path / "b")
    path, state = CheckpointStore(tmp_path / "b" / "checkpoints", 2).load_newest()
    assert (path.name, state["step"]) == ("step-00000001.pt", 1)
    write_run(tmp_path / "b", 2)
    second.upload()
    assert second.close(WAIT_S) is None
    assert load_checkpoint(find_checkpoint(url))["step"] == 2


def test_a_store_that_fails_for_a_while_does_not_stop_training(server, url, tmp_path, capsys):
    job = start(url, tmp_path / "a")
    server.fail(kind="full", method="PUT", path="checkpoints|metrics")
    write_run(tmp_path / "a", 1)
    for _ in range(2):
        assert not job._try_upload()
    assert capsys.readouterr().err.count("training continues") == 1
    server.fail()
    assert job.close(WAIT_S) is None
    assert "checkpoints/step-00000001.pt" in names(url)


def train(url, directory, server, fault, error=None):
    """Train as a job does: write a checkpoint when the store begins to fail, and end with ``error``."""
    with closing_upload(start(url, directory), WAIT_S, Preemption(0.2)):
        write_run(directory, 1)
        server.fail(**fault)
        if error is not None:
            raise error


def test_a_job_that_must_end_does_not_wait_for_the_store(server, url, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(url, tmp_path / "a", server, {"kind": "slow", "seconds": 20.0, "method": "PUT"}, KeyboardInterrupt())
    assert f"the newest files are in {tmp_path / 'a'}" in capsys.readouterr().err


def test_the_last_upload_is_repeated(server, url, tmp_path, monkeypatch):
    monkeypatch.setattr("distlenet.storage.upload.FIRST_DELAY_S", 0.05)
    with closing_upload(start(url, tmp_path / "a"), WAIT_S, Preemption(0.2)):
        write_run(tmp_path / "a", 1)
        server.fail(kind="full", method="PUT", path="checkpoints", times=ATTEMPTS + 1)
    assert server.fail()["PUT full"] == ATTEMPTS + 1
    assert "checkpoints/step-00000001.pt" in names(url)


def test_a_run_that_cannot_be_uploaded_fails_at_its_end(server, url, tmp_path, monkeypatch):
    monkeypatch.setattr("distlenet.storage.upload.FIRST_DELAY_S", 2 * WAIT_S)  # later than the end of the time
    with pytest.raises(UserError, match=r"QuotaExceeded.*the complete run is in .*: the same command there uploads it"):
        train(url, tmp_path / "a", server, {"kind": "full", "method": "PUT", "path": "checkpoints"})
    server.fail()
    assert start(url, tmp_path / "a").close(WAIT_S) is None
    assert "checkpoints/step-00000001.pt" in names(url)


def test_a_job_that_lost_the_run_uploads_nothing_more(url, tmp_path):
    first = start(url, tmp_path / "a")
    Objects(url).write(".locks/00000002", json.dumps({"nonce": "other", "host": "other"}).encode())
    write_run(tmp_path / "a", 1)
    assert isinstance(first.close(WAIT_S), LockLost)
    assert names(url) == []


def test_missing_runs(url):
    with pytest.raises(UserError, match=r"has no checkpoints/step-\*.pt"):
        find_checkpoint(url)
    with pytest.raises(UserError, match="no such object"):
        find_checkpoint(f"{url}/checkpoints/best.pt")
    with pytest.raises(UserError, match="has no files"):
        fetch_run(url)


# ---- defects that attacks found


def test_a_file_that_is_gone_before_it_is_uploaded_does_not_count(server, url, tmp_path, monkeypatch):
    """A newer checkpoint has replaced it on the disk: the store keeps the older one until that is uploaded."""
    job = start(url, tmp_path / "a", keep_last=1)
    write_run(tmp_path / "a", 1, keep_last=1)
    job.upload()
    write_run(tmp_path / "a", 2, keep_last=1)

    def fail(path, name, check):
        if "step-" in name:
            write_run(tmp_path / "a", 3, keep_last=1)
            raise StorageError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(job.objects, "upload", fail)
        job.upload()
    assert "checkpoints/step-00000001.pt" in names(url)
    assert job.close(WAIT_S) is None
    assert [name for name in names(url) if "step-" in name] == ["checkpoints/step-00000003.pt"]


def test_the_store_keeps_checkpoints_that_are_in_it(url, tmp_path):
    """Checkpoints that only the disk has, because uploads are slower than writes, replace none of the store."""
    job = start(url, tmp_path / "a")
    for step in (1, 2):
        write_run(tmp_path / "a", step)
        job.upload()
    for step in (3, 4, 5):
        write_run(tmp_path / "a", step)
    job.upload()
    steps = [name for name in names(url) if "step-" in name]
    assert steps == ["checkpoints/step-00000002.pt", "checkpoints/step-00000005.pt"]
    assert job.close(WAIT_S) is None


def test_a_job_that_loses_the_run_during_an_upload_stops_uploading(url, tmp_path):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    upload = first.objects.upload

    def suspended(path, name, check):
        upload(path, name, check)
        Objects(url).write(".locks/00000002", json.dumps({"nonce": "other", "host": "other"}).encode())

    first.objects.upload = suspended
    assert isinstance(first.close(WAIT_S), LockLost)
    assert names(url) == ["metrics.jsonl"]


def test_a_lock_that_somebody_removed_is_not_a_lost_run(url, tmp_path):
    first = start(url, tmp_path / "a")
    Objects(url).remove(".locks/00000001")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    assert "checkpoints/step-00000001.pt" in names(url)


@pytest.mark.parametrize("content", [b"", b"[1]"])
def test_a_damaged_lock_expires(url, content):
    Objects(url).write(".locks/00000007", content)
    job = run_lock(url, "a", expires_s=0.1)
    job.acquire(0.0)
    assert job.number == 8
    job.release()


def test_a_directory_that_two_stores_share_is_set_aside(url, tmp_path, capsys):
    """For example s3://b/x and s3://b//x, or a bucket of the same name on two servers."""
    for number, where in enumerate((url, f"{url}-other"), 1):
        job = start(where, tmp_path / "a")
        write_run(tmp_path / "a", number)
        assert job.close(WAIT_S) is None
    again = start(url, tmp_path / "a")
    steps = [path.name for path in (tmp_path / "a" / "checkpoints").glob("step-*")]
    assert steps == ["step-00000001.pt"]
    assert again.close(WAIT_S) is None
    assert "has no files of this run; the local files are moved to" in capsys.readouterr().err


def test_objects_that_others_put_there_are_not_downloaded(server, url, tmp_path):
    """A console makes an empty object for a directory; a name with .. would leave the local directory."""
    import boto3

    client, key = boto3.client("s3"), url.removeprefix("s3://runs/")
    for name in ("", "checkpoints/", "a/../../outside", ".local_copy.json"):
        client.put_object(Bucket="runs", Key=f"{key}/{name}", Body=b"" if name.endswith("/") else b"x")
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert job.close(WAIT_S) is None
    assert not (tmp_path / "outside").exists()
    second = start(url, tmp_path / "b")
    assert second.close(WAIT_S) is None
    fetch_run(url)


def test_a_local_directory_that_is_full_is_an_error(url, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distlenet.storage.local_copy.replace_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        start(url, tmp_path / "a")


def test_a_stop_request_ends_the_last_upload(server, url, tmp_path):
    """A scheduler that ends the job while it waits for the store does not wait long."""
    preemption = Preemption(0.2)
    preemption.handle_signal(signal.SIGINT)
    job = start(url, tmp_path / "a")
    with (
        pytest.raises(Preempted, match="the complete run is in") as stopped,
        closing_upload(job, 10 * WAIT_S, preemption),
    ):
        server.fail(kind="slow", seconds=20.0)
    assert stopped.value.status == 130  # no script requeues a Ctrl-C
