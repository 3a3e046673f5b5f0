"""How this process keeps memory that it will ask for again, and no more than that."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
"""Names of the C library's malloc.h."""

CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": 128, "LRU_CACHE_CAPACITY": 1}
"""Environment variables of oneDNN itself and of ideep, through which torch calls it: for how many shapes of products a compiled
kernel is kept, about 1.2 MB each. A step of preference rows needs some 90; ideep keeps again what oneDNN has, for each thread.
Over 300 steps of documents memory grew by 0.7 % from step 100 on, to 1.03 times that of 64 in both (`make bench-kernel-cache`);
256 took 1.2 times as much, and grew by 4 %."""


def steady_memory() -> None:
    """Both of the below, for a process that trains on a CPU."""
    keep_freed_memory()
    bound_cached_products()


def bound_cached_products() -> None:
    """Let fewer kernels be kept, unless the user's environment says how many. It is asked once, at the first product."""
    for name, capacity in CACHES.items():
        os.environ.setdefault(name, str(capacity))


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
