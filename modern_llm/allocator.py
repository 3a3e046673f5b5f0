"""How this process keeps memory that it will ask for again, and no more than that."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Names of the C library's malloc.h."""

CACHED_PRODUCTS = 64
"""Shapes of products that are remembered with their kernels, at 0.65 MB each (torch 2.13). Rows of documents bring new shapes
all the time, and what is kept for them lies scattered over the heap: 4 layers of 192 channels took 1.09 GiB after 70 steps with
the second of `CACHES` at its default of 1,024, and 0.73 GiB so, at the same rate."""

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables of oneDNN itself and of ideep, through which torch calls it."""


def steady_memory() -> None:
    """Both of the below, for a process that trains on a CPU."""
    keep_freed_memory()
    bound_cached_products()


def bound_cached_products() -> None:
    """Let fewer kernels be kept, unless the user's environment says how many. It is asked once, at the first product."""
    for name in CACHES:
        os.environ.setdefault(name, str(CACHED_PRODUCTS))


def keep_freed_memory() -> None:
    """From now on, memory that is freed stays with the process and is handed out again. Does nothing without glibc.

    glibc gives much of it back to the system at once, which clears it before it hands it out the next time: every optimizer
    step paid for its activations again. Huge pages (torch's THP_MEM_ALLOC_ENABLE) make that cheaper, but each tensor then
    begins at a multiple of 2 MiB, and most sizes leave a hole before the next.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**26)):
        mallopt(name, value)
