import contextlib
import os
import resource
import signal

import pytest

from distlenet.utils.errors import UserError
from distlenet.utils.files import LineFile, convert_io_errors, replace_text

pytestmark = pytest.mark.unit


@contextlib.contextmanager
def file_size_limit(size: int):
    """Let the kernel reject writes beyond ``size`` bytes of a file, like a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_stay_in_memory_while_the_disk_is_full_and_none_is_lost(tmp_path, capsys):
    path = tmp_path / "lines"
    file = LineFile(path)
    file.add("first")
    with file_size_limit(10):  # half of the second line fits
        file.add("second")
        file.add("third")
        assert path.read_text() == "first\n"
        with pytest.raises(OSError, match="File too large"):
            file.sync()
    assert path.read_text() == "first\n"
    file.add("fourth")
    file.sync()
    file.close()
    assert path.read_text() == "first\nsecond\nthird\nfourth\n"
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "cannot be written: File too large; its lines stay in memory, training continues" in warnings[0]


def test_an_existing_file_is_continued(tmp_path):
    for line in ("a", "b"):
        file = LineFile(tmp_path / "lines")
        file.add(line)
        file.close()
    assert (tmp_path / "lines").read_text() == "a\nb\n"


def test_pending_lines_are_written_without_a_new_line(tmp_path):
    file = LineFile(tmp_path / "lines")
    with file_size_limit(3):
        file.add("a line")
        file.flush()
        assert file.failure is not None
    file.close()
    assert (tmp_path / "lines").read_text() == "a line\n"


def test_a_text_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "text"
    replace_text(path, "old")
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        replace_text(path, "x" * 1000)
    assert path.read_text() == "old"
    assert os.stat(path).st_size == 3


def test_a_link_is_replaced_and_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("content")
    (tmp_path / "page.html").symlink_to(target)
    replace_text(tmp_path / "page.html", "new")
    assert target.read_text() == "content"
    assert (tmp_path / "page.html").read_text() == "new"
    assert not (tmp_path / "page.html").is_symlink()


def test_two_processes_replace_the_same_file(tmp_path, monkeypatch):
    """The other one writes after this one has written its temporary file."""
    path, replace = tmp_path / "text", os.replace

    def write_between(*paths):
        monkeypatch.undo()
        replace_text(path, "of the other")
        replace(*paths)

    monkeypatch.setattr("os.replace", write_between)
    replace_text(path, "own")
    assert path.read_text() == "own"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "expected"), [({}, ["fsync", "replace", "fsync"]), ({"durable": False}, ["replace"])]
)
def test_a_text_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch, options, expected):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=function: (calls.append(n), f(*args)))
    replace_text(tmp_path / "text", "text", **options)
    assert calls == expected


def test_no_temporary_file_stays_after_a_failure(tmp_path):
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        replace_text(tmp_path / "text", "x" * 1000)
    assert list(tmp_path.iterdir()) == []


def test_an_io_error_becomes_a_user_error_that_names_the_run(tmp_path):
    message = f"run directory {tmp_path}: cannot be written: No such file or directory"
    with pytest.raises(UserError, match=message), convert_io_errors(tmp_path):
        replace_text(tmp_path / "missing" / "file", "text")
