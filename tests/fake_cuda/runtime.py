"""What a program on the fake runtime can ask of it: counts, nodes, notes, bytes; and a peer that never answers."""

import ctypes
from collections.abc import Callable

LIBRARY = ctypes.CDLL(None)  # preloaded
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_long)


def _function(name: str, result: type | None = None, *arguments: type) -> Callable[..., object]:
    function = getattr(LIBRARY, name)
    function.restype, function.argtypes = result, arguments
    return function


reset = _function("fake_reset")  # counts and notes
hang = _function("fake_hang", None, ctypes.c_long)
"""hang(n): after n further collectives, one never ends; neither does the launch of a graph that contains one."""
device_bytes = _function("fake_device_bytes", ctypes.c_long)
execute = _function("fake_execute", None, ctypes.c_int)
quiet = _function("fake_quiet", None, ctypes.c_int)
enter = _function("fake_enter", ctypes.c_int, ctypes.c_void_p)
capture_id = _function("fake_capture_id", ctypes.c_uint64, ctypes.c_void_p)
record = _function("fake_record", None, ctypes.c_void_p, ctypes.c_long)
launch = _function("fake_launch", ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
set_callback = _function("fake_set_callback", None, Callback)
_forgotten = _function("fake_forgotten", ctypes.c_long, ctypes.POINTER(ctypes.c_uint64), ctypes.c_long)
_counts, _notes, _nodes = (_function(f"fake_{what}", ctypes.c_char_p) for what in ("counts", "notes", "nodes"))


def _lines(text: object) -> list[str]:
    assert isinstance(text, bytes)
    return text.decode().splitlines()


def counts() -> dict[str, int]:
    """Return how often each thing happened since the last reset.

    "launch" counts all kernels, copies and collectives that ran outside of graphs, and "kernel NAME", "copy A to B",
    "memset", "ncclX" each kind; besides "node" (of captures), "capture", "graph launch", "graph destroyed",
    "sync stream", "sync event", "sync device", "sync cudaMemcpy", "cudaEventQuery", "wait event", "record event",
    "cudaMalloc", "bytes cudaMalloc", "cudaFree", "bytes cudaFree", "cudaHostAlloc".
    """
    pairs = (line.rpartition("\t") for line in _lines(_counts()))
    return {what: int(n) for what, _, n in pairs}


def syncs() -> int:
    """Return how often the host waited for the device since the last reset."""
    return sum(n for what, n in counts().items() if what.startswith("sync "))


def notes() -> list[str]:
    """Return what was noted since the last reset: captures, errors, communicators, rules that were broken."""
    return _lines(_notes())


def nodes() -> list[str]:
    """Return the names of the nodes of the last capture that ended, in order."""
    return _lines(_nodes())


def forgotten() -> list[int]:
    """Return the captures that no graph holds any more, each once."""
    ids = (ctypes.c_uint64 * 64)()
    return list(ids[: _forgotten(ids, len(ids))])
