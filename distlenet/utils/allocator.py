"""glibc's allocator, told to keep what is freed.

Each step frees its activations and asks for the same sizes again. By default glibc gives blocks beyond some hundred
kilobytes back to the kernel each time, which then clears and maps fresh pages: up to a third of a small network's
step (benchmarks/RESULTS.md). Keeping them costs no more memory than the largest step has needed anyway.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_ON_HEAP = 32 * 2**20  # bytes; the most that M_MMAP_THRESHOLD takes on a machine of 64 bits (mallopt(3))
NEVER_TRIM = 2**31 - 1  # bytes; mallopt takes an int


def tune_malloc() -> bool:
    """Keep freed blocks for the next step; say whether the C library could be told (glibc can, musl cannot)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_ON_HEAP) and mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))
