"""What a run in an object store must not lose, and the messages of mistakes and of local faults."""

import contextlib
import errno
import threading
import time

import pytest
from s3fs import S3FileSystem
from stored_runs import WAIT_S, die, names, refuse_loss, server_fixture, start, take_over, url_fixture, write_run  # noqa: F401  # fixtures

from distlenet.checkpoint.format import load_checkpoint
from distlenet.checkpoint.store import CheckpointStore, find_checkpoint
from distlenet.config.loading import load_config
from distlenet.distributed.preemption import Preemption
from distlenet.export.trained_source import _best_of
from distlenet.storage.fetch import fetch_run
from distlenet.storage.lock import LockLost, RunLock
from distlenet.storage.objects import Objects, StorageError, retry
from distlenet.storage.stored_run import closing_upload
from distlenet.utils.errors import Preempted, UserError

pytestmark = pytest.mark.unit


def truncate(path, size):
    """Damage a file as a power cut does: the same inode, less content."""
    with open(path, "r+b") as file:
        file.truncate(size)


# ---- a damaged local copy


@pytest.mark.parametrize("damaged", [{1, 2}, {2}, {1}])
def test_a_damaged_checkpoint_is_downloaded_again(url, tmp_path, damaged, capsys):
    first = start(url, tmp_path / "a")
    for step in (1, 2):
        write_run(tmp_path / "a", step)
        first.upload()
    assert first.close(WAIT_S) is None
    for step in damaged:
        truncate(tmp_path / "a" / "checkpoints" / f"step-0000000{step}.pt", 1000)
    second = start(url, tmp_path / "a")
    path, state = CheckpointStore(tmp_path / "a" / "checkpoints", 2).load_newest()
    assert (path.name, state["step"]) == ("step-00000002.pt", 2)
    assert ("step-00000002.pt: is damaged, or older than in s3://" in capsys.readouterr().err) == (2 in damaged)
    write_run(tmp_path / "a", 3)
    assert second.close(WAIT_S) is None
    assert [name for name in names(url) if "step-" in name][-2:] == [
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000003.pt",
    ]


def test_a_damaged_checkpoint_that_only_the_disk_has(url, tmp_path):
    """The run resumes from the newest undamaged one, of the disk or of the store."""
    first = start(url, tmp_path / "a", keep_last=3)
    for step in (1, 2):
        write_run(tmp_path / "a", step, keep_last=3)
        first.upload()
    die(first)
    for step in (3, 4):
        write_run(tmp_path / "a", step, keep_last=3)
    truncate(tmp_path / "a" / "checkpoints" / "step-00000004.pt", 1000)
    second = start(url, tmp_path / "a", keep_last=3)
    assert CheckpointStore(tmp_path / "a" / "checkpoints", 3).load_newest()[1]["step"] == 3
    assert second.close(WAIT_S) is None


def test_a_damaged_best_checkpoint_does_not_replace_that_of_the_store(url, tmp_path):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1, best=True)
    assert first.close(WAIT_S) is None
    truncate(tmp_path / "a" / "checkpoints" / "best.pt", 1000)
    assert start(url, tmp_path / "a").close(WAIT_S) is None
    Objects(url).download("checkpoints/best.pt", tmp_path / "best.pt")
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 1


def test_a_truncated_history_does_not_replace_that_of_the_store(url, tmp_path, capsys):
    first = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    assert first.close(WAIT_S) is None
    history = tmp_path / "a" / "metrics.jsonl"
    truncate(history, 0)
    second = start(url, tmp_path / "a")
    assert history.read_text() == '{"step": 1}\n'
    assert "metrics.jsonl: is damaged, or older than in s3://" in capsys.readouterr().err
    with open(history, "a") as file:
        file.write('{"step": 2}\n')
    assert second.close(WAIT_S) is None
    assert Objects(url).read("metrics.jsonl") == b'{"step": 1}\n{"step": 2}\n'
    assert not (tmp_path / "a" / ".stale").exists()  # nothing else is replaced


# ---- a job that lost the run while it was suspended


def take_over_at(server, url, method, path, number=1):
    """Take the run when the server receives the ``number``-th such request, during which the job is suspended."""
    left = [number]

    def hook(requested, of):
        if requested == method and of.endswith(path):
            left[0] -= 1
            if left[0] == 0:
                take_over(url)

    server.app.hook = hook


@pytest.mark.parametrize("kind", ["busy", "error", "cut"])
def test_a_request_is_not_repeated_after_the_run_is_lost(server, url, tmp_path, kind):
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1, best=True)
    server.fail(kind=kind, method="PUT", path="best.pt", times=1)
    take_over_at(server, url, "PUT", "best.pt")
    assert isinstance(job.close(WAIT_S), LockLost)
    assert names(url) == ["metrics.jsonl"]


def test_a_request_is_not_sent_if_the_job_was_suspended_after_its_check(url, tmp_path):
    """The request is prepared in between: the file is read, its checksum and the signature are computed."""
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1)
    take_over(url)
    job.lock.check, check_age = lambda: None, job.lock.check_age  # the checks were before
    job.lock._checked = time.monotonic()

    def suspended():
        check_age()
        job.lock.check = type(job.lock).check.__get__(job.lock)
        job.lock._checked -= job.lock.expires_s

    job.lock.check_age = suspended
    assert isinstance(job.close(WAIT_S), LockLost)
    assert names(url) == []


@pytest.mark.parametrize("kind", ["busy", "error", "cut"])
def test_uploads_are_repeated(server, url, tmp_path, kind):
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1, best=True)
    server.fail(kind=kind, method="PUT", path="best.pt", times=2)
    job.upload()
    assert server.fail()[f"PUT {kind}"] == 2
    assert names(url) == ["checkpoints/best.pt", "checkpoints/step-00000001.pt", "metrics.jsonl"]
    assert job.close(WAIT_S) is None


@pytest.fixture
def large(url, tmp_path):
    """A job, which writes a file that s3fs sends in three parts of at most 50 MiB."""
    job = start(url, tmp_path / "a")
    with (tmp_path / "a" / "large.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    return job


def test_a_large_file_is_not_completed_after_the_run_is_lost(server, url, large):
    """The job is suspended during a part: its clock shows that the last check is old."""

    def suspend(method, path):
        if method == "PUT" and path.endswith("large.bin"):
            server.app.hook = lambda *_: None
            take_over(url)
            large.lock._checked -= large.lock.expires_s

    server.app.hook = suspend
    assert isinstance(large.close(WAIT_S), LockLost)
    assert names(url) == []


def test_parts_of_a_large_file_are_repeated(server, url, large):
    server.fail(kind="busy", method="PUT", path="large.bin", times=3)
    large.upload()
    counts = server.fail()
    assert (counts["PUT busy"], counts["POST ok"]) == (3, 2)  # the upload began once, and was completed
    assert names(url) == ["large.bin"]
    assert large.close(WAIT_S) is None


def test_nothing_is_removed_after_the_run_is_lost(server, url, tmp_path):
    job = start(url, tmp_path / "a", keep_last=1)
    write_run(tmp_path / "a", 1, keep_last=1)
    job.upload()
    write_run(tmp_path / "a", 2, keep_last=1)
    take_over_at(server, url, "PUT", "step-00000002.pt")
    assert isinstance(job.close(WAIT_S), LockLost)
    assert "checkpoints/step-00000001.pt" in names(url)


def test_a_run_that_is_lost_at_its_end(url, tmp_path):
    """The status is that of a stop request, as during training, and the message does not promise an upload."""
    context = closing_upload(start(url, tmp_path / "a"), WAIT_S, Preemption(0.2))
    context.__enter__()
    write_run(tmp_path / "a", 1)
    take_over(url)
    with pytest.raises(
        Preempted, match=r"has taken over this run.*only this job took are in .*, and are not"
    ) as stopped:
        context.__exit__(None, None, None)
    assert stopped.value.status == 75


# ---- mistakes, and local faults


def open_lock(url):
    RunLock(Objects(url), "a", refuse_loss).acquire(0.0)


def test_messages_name_the_run_and_the_setting(url, monkeypatch):
    with pytest.raises(StorageError, match=r"^s3://rnus/a: The specified bucket does not exist; create the bucket, or"):
        open_lock("s3://rnus/a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"/run: Unable to locate credentials; set AWS_ACCESS_KEY_ID and") as error:
        open_lock(url)
    assert error.value.permanent
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "refused", "/file")])
def test_a_fault_of_the_local_disk_is_not_one_of_the_network(url, tmp_path, monkeypatch, error):
    objects = Objects(url)
    objects.write("x", b"content")

    def fail(_, path):
        (tmp_path / ".x.downloading").write_bytes(b"con")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(objects.fs, "get_file", fail)
        with pytest.raises(StorageError, match="this is the local disk: check its space and permissions, or"):
            retry(lambda: objects.download("x", tmp_path / "x"), WAIT_S)
    assert list(tmp_path.glob(".x*")) == []  # a part of a file would fill the disk


@pytest.mark.parametrize("part", ["a::b", "x?versionId=1"])
def test_names_that_fsspec_would_not_read_as_names(part):
    with pytest.raises(UserError, match="cannot be a part of a URL; remove it"):
        Objects(f"s3://runs/{part}")
    for settings in ([f"run.dir=s3://runs/{part}"], ["run.dir=s3://runs", f"run.name={part}"]):
        with pytest.raises(UserError, match=r"run.dir and run.name: s3://runs.*cannot be a part of a URL; remove it"):
            load_config([], settings)


# ---- reading a run


def test_two_commands_fetch_a_run_at_once(server, url):
    Objects(url).write("metrics.jsonl", b"content")
    barrier, failures = threading.Barrier(2, timeout=1.0), []

    def hook(method, path):  # lets two downloads of one file end together, if they are possible
        if method == "GET" and path.endswith("metrics.jsonl"):
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait()

    def fetch():
        try:
            fetch_run(url)
        except UserError as error:
            failures.append(error)

    server.app.hook = hook
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert failures == []


def test_a_fetched_run_has_no_files_of_an_earlier_one(url):
    objects = Objects(url)
    for name in ("metrics.jsonl", "summary.json", "diagnosis/a.json"):
        objects.write(name, b"{}")
    directory = fetch_run(url)
    (directory / "report.html").write_text("report")
    objects.remove("summary.json")
    objects.remove("diagnosis/a.json")
    assert fetch_run(url) == directory
    files = sorted(path.name for path in directory.rglob("*") if path.is_file())
    assert files == [".lock", "metrics.jsonl", "report.html"]


@pytest.mark.parametrize("bucket", ["s3://rnus", "s3://runs"])
def test_nothing_stays_of_a_run_that_is_not_in_the_store(url, tmp_path, monkeypatch, bucket):  # a server
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError):
        fetch_run(f"{bucket}/another/run")
    assert list(tmp_path.rglob("fetched")) == []


def test_which_checkpoint_a_url_names(url, tmp_path):
    job = start(url, tmp_path / "a")
    write_run(tmp_path / "a", 1, best=True)
    assert job.close(WAIT_S) is None
    assert find_checkpoint(f"{url}/checkpoints").name == "step-00000001.pt"
    with pytest.raises(UserError, match=r"an object store has no last\.pt; give the URL of the run"):
        find_checkpoint(f"{url}/checkpoints/last.pt")
    best = f"{url}/checkpoints/best.pt"
    assert [_best_of(each) for each in (url, f"{url}/checkpoints", best)] == [best] * 3
    with pytest.raises(UserError, match=r"--weights best: .*step-00000001\.pt has no checkpoints/best\.pt"):
        _best_of(f"{url}/checkpoints/step-00000001.pt")
