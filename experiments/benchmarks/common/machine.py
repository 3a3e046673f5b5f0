"""Where and with what a benchmark ran."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("modern-llm", "torch", "transformers", "trl", "flash-attn", "liger-kernel")
BUSY = 0.5
"""Mean number of runnable processes in the last minute from which a measurement is doubtful."""


def machine(gpu: bool) -> str:
    """Processor, cores and GPU, in words."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    found = f"{cpu}, {os.cpu_count()} cores"
    if gpu:
        import torch

        found += f", {torch.cuda.get_device_name()}"
    return found


def versions() -> dict[str, str]:
    """Of every package that decides a rate, as far as it is there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_now() -> float:
    """How busy the machine is before the benchmark begins; too busy is said."""
    load = round(os.getloadavg()[0], 2)
    if load > BUSY:
        print(f"this machine is busy (load {load}): rates will not mean much")
    return load


def circumstances(gpu: bool, load: float) -> dict[str, Any]:
    """The last keys of every benchmark's JSON."""
    return {
        "load_before": load,
        "huge_pages_for_both": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "versions": versions(),
        "machine": machine(gpu),
        "date": date.today().isoformat(),
    }
