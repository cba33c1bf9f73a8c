import contextlib
import os
import resource
import signal

import pytest

from distlenet.utils.files import LineFile, replace_text

pytestmark = pytest.mark.unit


@contextlib.contextmanager
def a_disk_of(size: int):
    """The kernel's own refusal to write more than ``size`` bytes of a file."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_wait_for_a_full_disk_and_none_is_torn_or_lost(tmp_path, capsys):
    path = tmp_path / "lines"
    file = LineFile(path)
    file.add("first")
    with a_disk_of(10):  # the second line fits by half
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
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "cannot be written: File too large; its lines stay in memory, training continues" in told[0]


def test_it_goes_on_at_the_end(tmp_path):
    for line in ("a", "b"):
        file = LineFile(tmp_path / "lines")
        file.add(line)
        file.close()
    assert (tmp_path / "lines").read_text() == "a\nb\n"


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "text"
    replace_text(path, "old")
    with a_disk_of(100), pytest.raises(OSError, match="File too large"):
        replace_text(path, "x" * 1000)
    assert path.read_text() == "old"
    assert os.stat(path).st_size == 3


def test_lines_that_wait_are_tried_again_without_a_new_one(tmp_path):
    file = LineFile(tmp_path / "lines")
    with a_disk_of(3):
        file.add("a line")
        file.flush()
        assert file.failure is not None
    file.close()
    assert (tmp_path / "lines").read_text() == "a line\n"


def test_a_link_in_the_way_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / ".page.html.writing").symlink_to(elsewhere)
    replace_text(tmp_path / "page.html", "new")
    assert elsewhere.read_text() == "mine"
    assert (tmp_path / "page.html").read_text() == "new"
    assert not (tmp_path / "page.html").is_symlink()
