"""What this machine can do at most, measured: the rate of matrix products and of copying memory.

No data sheet is asked: a laptop's frequency, a container's share of the cores and a library's kernels all show in a
measurement. The limit of a run's arithmetic is the best rate of a square product in its precision, under the run's own settings
(threads, `torch.set_float32_matmul_precision`). Measured while the machine does other work it comes out too low, and shares of
it too high.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from modern_llm.products import product

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Square products of the quick measurement, width = height; smaller first."""
CAREFUL_SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
"""Those of `modern-llm bench`."""
QUICK_SECONDS = 0.05
"""How long the quick measurement repeats each size. A size that is foreseen to take longer than this once is left out."""
COPIED_BYTES = 2**27
"""Bytes that `copy_rate` reads, and as many that it writes: more than a processor's cache holds."""
LEAST_REPEATS = 2
"""The first product of a shape also builds its kernel."""


@functools.cache
def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square product: the peak that `mfu` in every run's log is a share of.

    Measured once a process, in about a tenth of a second; the global random state is left as it was.

    Args:
        device: where.
        dtype: type of the factors, `torch.float32` or `torch.bfloat16`.
    """
    best = 0.0
    for size in SIZES[device.type]:
        if best and 2 * size**3 / best > QUICK_SECONDS:
            break  # a slow machine gets its limit from the smaller product
        best = max(best, matmul_rate(device, dtype, size, QUICK_SECONDS))
    return best


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """FLOP/s of (size, size) × (size, size), the best of as many products as fit into the time, two at least.

    A product of that shape is 2 · size³ operations: a multiplication with its addition is two.
    """
    left, right = _factor(device, dtype, size, 0), _factor(device, dtype, size, 1)
    out = torch.empty_like(left)
    return 2 * size**3 / _fastest(lambda: product(left, right, out), device, seconds)


@functools.cache
def copy_limit(device: torch.device) -> float:
    """Bytes per second that one large copy reads and writes together; measured once a process."""
    return copy_rate(device, QUICK_SECONDS)


def copy_rate(device: torch.device, seconds: float) -> float:
    """The same, the best of as many copies as fit into the time, two at least."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _fastest(lambda: target.copy_(source), device, seconds)


def _factor(device: torch.device, dtype: torch.dtype, size: int, seed: int) -> Tensor:
    """(size, size) values that look random (a GPU multiplies zeros faster than it can keep up), made cheaply."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, columns = (torch.rand(size, generator=generator, device=device) - 0.5 for _ in range(2))
    return (rows[:, None] * columns).to(dtype)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest repeat."""
    best, repeats, began = float("inf"), 0, time.perf_counter()
    while repeats < LEAST_REPEATS or time.perf_counter() - began < seconds:
        start = _clock(device)
        work()
        best = min(best, _clock(device) - start)
        repeats += 1
    return best


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
