"""What this machine can do at most, measured: the rate of matrix products and of copying memory.

No data sheet is asked: a laptop's frequency, a container's share of the cores and a library's kernels all show in a
measurement. The limit of a run's arithmetic is the best rate of a square product in its precision, under the run's own settings
(threads, `torch.set_float32_matmul_precision`). Measured while the machine does other work it comes out too low, and shares of
it too high; so the best of all looks on a machine is kept.
"""

import functools
import hashlib
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, PositiveFloat, PositiveInt
from torch import Tensor

from modern_llm import distributed
from modern_llm.config.paths import cache_folder
from modern_llm.products import product

SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Square products of the quick measurement, width = height; smaller first."""
CAREFUL_SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
"""Those of `modern-llm bench`."""
QUICK_SECONDS = 0.05
"""How long the quick measurement repeats each size. A size that is foreseen to take longer than this once is left out."""
FIRST_LOOKS = 3
"""Quick measurements behind each other where a machine has no limit yet."""
COPIED_BYTES = 2**27
"""Bytes that `copy_rate` reads, and as many that it writes: more than a processor's cache holds."""
LEAST_REPEATS = 2
"""The first product of a shape also builds its kernel."""


class Limit(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Rate of square products that a machine has shown."""

    flops_per_second: PositiveFloat
    looks: PositiveInt
    """Measurements that it is the best of."""


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square product: the peak that `mfu` in every run's log is a share of."""
    return measured_limit(device, dtype).flops_per_second


@functools.cache
def measured_limit(device: torch.device, dtype: torch.dtype) -> Limit:
    """Return the best of a look now and of all before it on this machine, which are kept in the cache folder.

    Once a process, in about a tenth of a second; the first time there are `FIRST_LOOKS`. The global random state is left as it
    was.

    Args:
        device: where.
        dtype: type of the factors, `torch.float32` or `torch.bfloat16`.
    """
    try:
        known = Limit.model_validate_json(_limit_file(device, dtype).read_bytes())
        best, looks = known.flops_per_second, known.looks
    except (OSError, ValueError):  # none yet, or damaged: it is measured anew
        best, looks = 0.0, 0
    for _ in range(max(1, FIRST_LOOKS - looks)):
        best, looks = max(best, _look(device, dtype)), looks + 1
    limit = Limit(flops_per_second=best, looks=looks)
    remember(device, dtype, limit)
    return limit


def remember(device: torch.device, dtype: torch.dtype, limit: Limit) -> None:
    """Keep a limit for the processes to come, in place of the one that is kept."""
    file = _limit_file(device, dtype)
    with suppress(OSError):  # nothing needs it: the next process begins with no looks, and its log says so
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(limit.model_dump_json(), encoding="utf-8")  # half of it is no JSON, so it would be measured anew


def _limit_file(device: torch.device, dtype: torch.dtype) -> Path:
    """The file of one limit; its name is made of all that decides the limit."""
    settings = (torch.get_num_threads(), torch.get_float32_matmul_precision(), distributed.world_size())
    machine = repr((device.type, device_name(device), str(dtype), torch.__version__, *settings))
    return cache_folder() / "limits" / f"{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _look(device: torch.device, dtype: torch.dtype) -> float:
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


def device_name(device: torch.device) -> str:
    """The GPU's, else the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
