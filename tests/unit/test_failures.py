"""Failure reports: which ranks print what."""

import json
from contextlib import closing

import pytest
import torch
from loaders import make_loader
from torch.distributed import HashStore

from distlenet.data.sources.custom import SampleImages
from distlenet.distributed.environment import DistributedEnvironment
from distlenet.distributed.failures import MAX_REPORTS, format_failure, report_failures
from distlenet.distributed.rank_log import RankLog
from distlenet.distributed.tracebacks import PACKAGE, user_traceback
from distlenet.utils.agent_report import forbid_restarts, rank_has_failed, restarts_are_forbidden
from distlenet.utils.errors import RankError, UserError

pytestmark = pytest.mark.unit


def fail(store, rank, error, ranks=20):
    env = DistributedEnvironment(rank=rank, world_size=ranks)
    with pytest.raises(type(error)), report_failures(store, env, RankLog(env, torch.device("cpu"))):
        raise error


def test_the_first_failure_has_a_traceback_the_next_one_line_and_the_rest_nothing(capsys):
    store = HashStore()
    fail(store, 7, MemoryError("none left"))
    first = capsys.readouterr().err.splitlines()
    assert first[0].startswith("distlenet: rank 7 of 20 on ")
    assert first[0].endswith(" failed:")
    assert first[1] == "  Traceback (most recent call last):"
    assert "/failures.py" not in first[2]
    assert first[-1] == "  MemoryError: none left"
    for rank in range(1, MAX_REPORTS):
        fail(store, rank, RuntimeError("CUDA error\n" + 500 * "x"))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"distlenet: rank {rank} of 20 on ")
        assert "failed after it: RuntimeError: CUDA error xxx" in line
        assert len(line) < 300
    fail(store, 19, RuntimeError("x"))
    assert capsys.readouterr().err == ""


def error_of_gloo():
    """Return an exception without frames: those of a test are the user's code for ``distlenet``."""
    return RuntimeError("[/pytorch/gloo/pair.cc:561] Connection closed by peer [10.0.0.2]:2000")


def test_a_lost_connection_is_one_line_and_only_if_no_rank_has_failed_before(capsys):
    env = DistributedEnvironment(rank=0, world_size=20)
    line = format_failure(error_of_gloo(), env, "logs/rank-00000.log")
    assert line == (
        f"distlenet: {env} lost a connection: RuntimeError: Connection closed by peer [10.0.0.2]:2000; another rank "
        "has exited without a report: killed, out of memory, or its node is down; the log is logs/rank-00000.log"
    )
    with pytest.raises(RuntimeError):
        raise_in_distlenet(store_with_a_failure(), env, error_of_gloo())
    assert capsys.readouterr().err == ""


def store_with_a_failure():
    store = HashStore()
    store.add("failures", 1)
    return store


def raise_in_distlenet(store, env, error):
    """Raise in a frame that is not the user's: code whose file is in the package."""
    names = {"report_failures": report_failures, "store": store, "env": env, "error": error}
    names["log"] = RankLog(env, torch.device("cpu"))
    source = "with report_failures(store, env, log):\n    raise error"
    exec(compile(source, str(PACKAGE / "reduction/barrier.py"), "exec"), names)


def test_a_server_of_the_user_is_no_rank(capsys):
    fail(HashStore(), 0, ConnectionResetError("Connection reset by peer"))
    assert capsys.readouterr().err.splitlines()[-1] == "  ConnectionResetError: Connection reset by peer"


class Flowers:
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index):
        return torch.zeros(1, 4, 4, dtype=torch.uint8), [0][index]


def test_the_screen_begins_with_the_code_of_the_user_and_the_log_has_all(tmp_path, capsys):
    """The frames of distlenet between the training and the dataset are about 30 lines."""
    env = DistributedEnvironment()
    split = SampleImages(Flowers(), "training set", None)
    log = RankLog(env, torch.device("cpu"))
    log.open(tmp_path)
    with closing(log), pytest.raises(IndexError), report_failures(HashStore(), env, log):
        split[1]
    path = tmp_path / "logs/rank-00000.log"
    headline, title, *frames = capsys.readouterr().err.splitlines()
    assert headline == f"distlenet: failed; the log is {path}:"
    assert title == "  Traceback (most recent call last):"
    assert [frame.split()[-1] for frame in frames if frame.startswith("    File")] == ["__getitem__", "read"]
    assert frames[-1] == "  IndexError: list index out of range"
    assert "custom.py" in path.read_text()


def test_an_exception_of_a_loader_worker_is_shown_without_the_frames_that_raise_it_again():
    text = "Caught IndexError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ..."
    try:
        raise_in_distlenet(HashStore(), DistributedEnvironment(), IndexError(text))
    except IndexError as error:
        lines = format_failure(error, DistributedEnvironment(), "a.log").splitlines()
    assert lines[:2] == ["distlenet: failed; the log is a.log:", "  IndexError: " + text.splitlines()[0]]


class UnreadableFiles:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index):
        raise ValueError(f"cannot read file {index}")


def test_an_exception_in_a_loader_worker_is_shown_from_the_code_of_the_user_on():
    loader = make_loader(UnreadableFiles(), 2, num_workers=1)
    with closing(loader), pytest.raises(ValueError, match="cannot read file") as error:
        next(loader.epoch(0))
    shown = user_traceback(error.value)
    frames = [line for line in shown if line.startswith('  File "')]
    assert [frame.split()[-1] for frame in frames] == ["__getitem__", "read"]
    assert shown[0] == "ValueError: Caught ValueError in DataLoader worker process 0."
    assert shown[-1].startswith("ValueError: cannot read file")


def test_torchrun_gets_the_first_failure_but_not_a_lost_connection(tmp_path, monkeypatch):
    """The other ranks, which torchrun ends then, print nothing: the error stays the last line on the screen."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0/error.json"))
    (tmp_path / "0").mkdir()
    with pytest.raises(RuntimeError):
        raise_in_distlenet(HashStore(), DistributedEnvironment(), error_of_gloo())
    assert not rank_has_failed()
    fail(HashStore(), 7, MemoryError("none left"))
    message = json.loads((tmp_path / "0/error.json").read_text())["message"]["message"]
    assert message.endswith("failed: MemoryError: none left")
    assert rank_has_failed()


def test_without_a_store_every_rank_prints_its_traceback(capsys):
    class UnreachableStore:
        def set_timeout(self, _):
            raise RuntimeError("the store does not respond")

    fail(UnreachableStore(), 3, ValueError("x"))
    assert "  ValueError: x" in capsys.readouterr().err


def test_a_user_error_is_printed_once_and_at_once(capsys):
    store = HashStore()
    fail(store, 3, UserError("image caf\udce9.png: no label"))  # a name that is no UTF-8
    assert capsys.readouterr().err == "distlenet: image caf\\udce9.png: no label\n"
    fail(store, 0, UserError("image caf\udce9.png: no label"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "ranks"), [(RankError("x"), 20), (UserError("x"), 1)])
def test_the_entry_point_prints_what_may_differ_between_nodes_or_is_of_one_process(capsys, error, ranks):
    fail(HashStore(), 0, error, ranks)
    assert capsys.readouterr().err == ""
    assert not hasattr(error, "reported")


def test_a_rank_that_loses_the_connection_to_one_with_a_user_error_raises_it_too(capsys):
    store = HashStore()
    fail(store, 3, UserError("sample 7: no label"))
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^sample 7: no label$") as error:
        raise_in_distlenet(store, DistributedEnvironment(rank=0, world_size=20), error_of_gloo())
    assert not error.value.reported
    assert capsys.readouterr().err == ""


def test_only_one_rank_of_a_node_ends_the_agent(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTLENET_NO_RESTARTS_FILE", str(tmp_path / "no-restarts"))
    assert [forbid_restarts() for _ in range(3)] == [True, False, False]
    assert restarts_are_forbidden()
